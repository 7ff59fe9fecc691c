"""Our networks as models of MindFormers: its registry builds them, its trainer trains them, by the names in a YAML.

MindFormers copies the file that `--register_path` and `auto_register` name, and imports the copy, so imports here have
full names. docs/mindformers.md has the YAML. Needs the extra [mindformers], in an environment of its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mindspore as ms
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.llama import LlamaConfig
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.tools.utils import get_predict_run_mode
from mindformers.wrapper.wrapper import MFTrainOneStepCell
from mindspore import Tensor, ops
from pydantic import ValidationError

from llm_core.config import model_section
from llm_core.models.decoder import CausalLM
from llm_core.models.heads import TokenLoss
from llm_core.models.spec import DecoderSpec, spec_from_config

_IGNORED = -100
_TINY = 1e-8  # MindFormers adds it to the number of supervised tokens


class _Config(PretrainedConfig):
    """A family that MindFormers has no configuration of: our keys with our defaults; others are kept as they are."""

    section: type[model_section.DecoderConfig]

    def __init__(self, **keys: Any) -> None:
        fields = self.section.model_fields
        given = {name: fields[name].validation_alias or name for name in fields if name != "type"}
        section = self.section(type=self.section.__name__, **{name: keys[name] for name in given if name in keys})
        super().__init__(**keys, **{name: getattr(section, name) for name in given if name not in keys})


class InternLMConfig(_Config):
    """InternLM: Llama with biases in the attention."""

    section = model_section.InternLMConfig


class FalconConfig(_Config):
    """Falcon, of all three layouts."""

    section = model_section.FalconConfig


def spec_of(config: PretrainedConfig, section: type[model_section.DecoderConfig]) -> DecoderSpec:
    """The spec of MindFormers' or our configuration object. ValueError or UserError for values that do not fit."""
    values: dict[str, Any] = {"type": section.__name__}
    for name in section.model_fields:
        value = getattr(config, name, None)
        if value is not None and name not in ("type", "pet_config"):
            values[name] = str(value).lower() if isinstance(value, ms.Type) else value
    if getattr(config, "attn_proj_has_bias", False) and getattr(config, "qkv_has_bias", False):
        values["has_bias"] = True
    family = section.__name__.removesuffix("Config")
    arch = SimpleNamespace(type=f"{family}ForCausalLM")
    try:
        return spec_from_config(SimpleNamespace(arch=arch, config=section(**values)))
    except ValidationError as error:  # MindFormers makes errors anew from their text, which pydantic's cannot be
        raise ValueError(str(error)) from None


class _Model(PreTrainedModel):
    """A causal language model with the inputs and outputs of MindFormers' Llama, and its parameter names.

    Trained: input_ids int32 [B, S+1] (labels likewise, or None) -> the mean loss of the supervised tokens, counted as
    MindFormers does. Evaluated: input_ids [B, S] -> (logits [B, S, V], input_ids, mask [B, S]). Text is generated with
    run_llm.py: a run in predict mode and use_past are refused; so are pet_config and qkv_concat.
    """

    section: type[model_section.DecoderConfig]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config, auto_prefix=False)
        if getattr(config, "use_past", False) or get_predict_run_mode():
            raise ValueError("use_past: this network has no cache under MindFormers; predict with run_llm.py")
        if getattr(config, "pet_config", None):
            raise ValueError("pet_config: adapters of this network are trained with run_llm.py")
        if getattr(config, "qkv_concat", False):
            raise ValueError(
                "qkv_concat: MindFormers 1.9 joins projections head by head, and this network one below the other; "
                "set it False, with a checkpoint of split projections"
            )
        self.config = config
        self.net = CausalLM(spec_of(config, self.section), seed=ms.get_seed() or 0)
        self.token_loss = TokenLoss(self.net)
        self.pad_token_id, self.ignore_token_id = config.pad_token_id, getattr(config, "ignore_token_id", _IGNORED)
        self.load_checkpoint(config)

    def construct(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        if self.training:
            return self.loss(input_ids, input_ids if labels is None else labels)
        mask = ops.cast(input_ids != self.pad_token_id, ms.float32)
        if labels is not None:
            mask = mask * ops.cast(labels != self.ignore_token_id, ms.float32)
        return self.net(input_ids), input_ids, mask

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of tokens that are no padding and whose label is not ignored; both int32 [B, S+1]."""
        tokens, labels = input_ids[:, :-1], labels[:, 1:]
        kept = ops.logical_and(tokens != self.pad_token_id, labels != self.ignore_token_id)
        total, count = self.token_loss(tokens, ops.where(kept, labels, _IGNORED))
        return total / (count + _TINY)


class LlamaForCausalLM(_Model):
    """Llama on this project's operators; its configuration is MindFormers' own LlamaConfig."""

    config_class, section = LlamaConfig, model_section.LlamaConfig


class InternLMForCausalLM(_Model):
    """InternLM, which MindFormers dropped after 1.3."""

    config_class, section = InternLMConfig, model_section.InternLMConfig


class FalconForCausalLM(_Model):
    """Falcon, which MindFormers never had."""

    config_class, section = FalconConfig, model_section.FalconConfig


class TrainOneStepOnCPU(MFTrainOneStepCell):
    """MindFormers' train step where there is no Ascend: it looks for overflow in the gradients themselves.

    The step of 1.9.0 reads a status register of the Ascend, or asks an operator of GPUs; a CPU has neither.
    """

    def get_overflow_status(self, status: Any, compute_output: tuple[Tensor, ...]) -> Tensor:
        """Whether a gradient is infinite or no number, bool []; `status` is the Ascend's."""
        finite = Tensor(True)
        for gradient in compute_output:
            finite = ops.logical_and(finite, ops.isfinite(gradient).all())
        return ops.logical_not(finite)
