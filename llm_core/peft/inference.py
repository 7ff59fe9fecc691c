"""A base and its adapter as one network, for evaluation and prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llm_core.checkpoint.weights import LoadReport
from llm_core.errors import UserError
from llm_core.models.spec import DecoderSpec
from llm_core.peft.adapters import Adapter, fingerprint, load_adapter, load_base, require_base, require_head
from llm_core.peft.apply import ADAPTER_MARK, build_net, is_adapter_name, is_trainable
from llm_core.peft.lora import LORA_A
from llm_core.peft.merge import merge_lora

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mindspore import Parameter, nn

    from llm_core.checkpoint.reshard import Share


def net_with_adapter(
    spec: DecoderSpec, path: str, adapter: Adapter | None, share: Share | None = None, strategy: str = "", **piece: Any
) -> tuple[nn.Cell, LoadReport]:
    """The network of `spec` with the base's weights of load_checkpoint `path` and the adapter, and what was loaded.

    A LoRA is merged into the weights where `is_merged` says so: then a token costs what it costs the base.
    share, piece: of one of several ranks, see `parallel.share.own_pieces`. strategy: as for `load_base`. Raises
    UserError as `load_base` and `load_adapter` do, and for a DoRA where no rank has whole weights.
    """
    pet = None if adapter is None else adapter.pet
    if share is not None and share.layout.tp > 1 and getattr(pet, "use_dora", False):
        raise UserError(
            f"parallel_config.model_parallel: {adapter.source} is a DoRA, which needs whole weights: set it to 1, or "
            "merge the adapter into its base with tools/merge_lora.py"
        )
    merged = is_merged(spec, pet)
    net = build_net(spec, None if merged else pet, seed=None, **piece)
    if merged and share is not None:  # for the fingerprint of the frozen weights, taken while they are whole
        for parameter in net.get_parameters():
            parameter.requires_grad = is_trainable(parameter.name, spec, pet)
    report = load_base(net, path, share, strategy)
    if adapter is not None:
        (merge_into if merged else load_adapter)(net, adapter, share, None if share is None else report.fingerprint)
        report.missing[:] = [name for name in report.missing if name not in adapter.tensors]  # a classifier's head
        require_head(report.missing, spec, pet, path)
    return net, report


def is_merged(spec: DecoderSpec, pet: Any) -> bool:
    """Whether the adapter of `pet` is merged for inference: a LoRA whose products are all float32.

    With bfloat16 products they are rounded apart, W x and B A x, and W + B A would be rounded otherwise.
    """
    return pet is not None and pet.pet_type == "lora" and not spec.bf16 and pet.compute_dtype != "bfloat16"


def merge_into(
    net: nn.Cell, adapter: Adapter, share: Share | None = None, base: Mapping[str, str] | None = None
) -> None:
    """Merge a LoRA, and what was trained beside it, into the parameters of `net`, the plain network of its base.

    Layer by layer: beside the weights there is room for one layer only. share, base: as for `load_adapter`. Raises
    UserError, before a value is set, when the base in `net` is another one than the adapter was trained on.
    """
    parameters = net.parameters_dict()
    if adapter.base_fingerprint:
        frozen = sorted(name for name in parameters if not is_trainable(name, net.spec, adapter.pet))
        require_base(adapter, base or fingerprint((name, parameters[name].asnumpy()) for name in frozen))
    tensors = {name: _own(name, array, share) for name, array in adapter.tensors.items()}
    for name, array in tensors.items():
        if not is_adapter_name(name) and name in parameters:
            _set(parameters[name], array)
    for layer in [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]:
        parameter = parameters.get(f"{layer}weight")
        if parameter is None:  # another stage's
            continue
        factors = {name: array for name, array in tensors.items() if name.startswith(f"{layer}{ADAPTER_MARK}")}
        _set(parameter, merge_lora({parameter.name: parameter.asnumpy()}, factors, adapter.pet)[parameter.name])


def _own(name: str, array: np.ndarray, share: Share | None) -> np.ndarray | None:
    """What a rank holds of a tensor; None: nothing."""
    box = (...,) if share is None else share.box(name, array.shape)
    return None if box is None else array[box]


def _set(parameter: Parameter, array: np.ndarray) -> None:
    from mindspore import Tensor

    parameter.set_data(Tensor(np.ascontiguousarray(array), dtype=parameter.dtype))
