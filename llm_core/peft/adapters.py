"""Adapters on disk: found by path or by name, read, held against the model and the base they were made for.

A run with a pet_config saves what it trains, and nothing of the base. How the adapter was made stands in the
checkpoint's manifest, as `state["adapter"]`:

    {"pet_config": {...}, "base": load_checkpoint of the run, "base_fingerprint": {name: hash}, see `fingerprint`}

MindFormers' files say nothing of the kind, Hugging Face's folders all but the fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_core.checkpoint.files import read_heads
from llm_core.checkpoint.locate import passed_over
from llm_core.checkpoint.manifest import verified_version
from llm_core.checkpoint.state_names import without_state
from llm_core.checkpoint.weights import LoadReport, SelectedTensors, WeightFiles, load_into, open_weights
from llm_core.errors import UserError
from llm_core.models.shapes import parameter_shapes
from llm_core.peft import lora
from llm_core.peft.apply import ADAPTER_MARK, adapter_shapes, is_adapter_name, is_saved

if TYPE_CHECKING:
    from mindspore import nn

    from llm_core.checkpoint.reshard import Share
    from llm_core.config import RunConfig
    from llm_core.models.spec import DecoderSpec

FOLDER = "adapters"  # beside a base: adapters/NAME
_SAMPLED = 64  # values of each tensor that a fingerprint looks at
_HASH = 8  # hex digits that a fingerprint keeps of each tensor
_SHOWN = 3
_EMBEDDING = "model.tok_embeddings.embedding_weight"  # every base has one


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its model: its values by name (fp32), and what is known of how it was made.

    base and base_fingerprint are empty where the files do not say.
    """

    source: Path
    pet: Any
    tensors: dict[str, np.ndarray]
    base: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the log."""
        return f"{self.source}: adapter: {describe(self.pet)}, {len(self.tensors)} parameters"


def open_adapter(config: RunConfig, spec: DecoderSpec) -> Adapter | None:
    """The adapter that a run starts from: of adapter_id, else one that lies in load_checkpoint beside the base.

    None where there is none. Raises UserError where there is none of that name, and where it does not fit the model or
    the run's pet_config.
    """
    wanted = config.model.config.pet_config
    if config.adapter_id:
        return read_adapter(find_adapter(config.adapter_id, config.load_checkpoint), spec, wanted)
    found = adapter_in(config.load_checkpoint) if config.load_checkpoint else None
    return None if found is None else read_adapter(found, spec, wanted)


def adapter_in(path: str) -> Path | None:
    """The one of `adapters_in`; None where there is none. UserError where there are several."""
    found = adapters_in(path)
    if len(found) > 1:
        raise UserError(
            f"load_checkpoint: {path}: {len(found)} adapters lie beside the base: {', '.join(map(str, found))}; name "
            "the one to use with --adapter_id"
        )
    return found[0] if found else None


def adapters_in(path: str) -> list[Path]:
    """Where load_checkpoint holds adapters, by their names: among the files it stands for (then `path` itself, if that
    is all), in files of other names beside a base, as a PEFT folder. UserError when there is nothing at all."""
    from llm_core.peft.hf_adapter import is_hf_adapter

    place = Path(path).expanduser()
    weights = open_weights(place)
    weights.close()
    inside = [file.path for file in weights.files if any(map(is_adapter_name, file.heads))]
    beside = [file for file in passed_over(place) if any(map(is_adapter_name, read_heads(file)))]
    if is_hf_adapter(place):
        return [place, *inside, *beside]
    return [place] if inside and not beside else inside + beside


def find_adapter(adapter_id: str, load_checkpoint: str) -> Path:
    """A path as it is; else the folder of that name in `adapters/` beside the base. UserError when there is neither."""
    path = Path(adapter_id).expanduser()
    if path.exists():
        return path
    beside = [] if not load_checkpoint else [Path(load_checkpoint).expanduser()]
    beside = [(base if base.is_dir() else base.parent) / FOLDER for base in beside]
    for folder in beside:
        if (folder / adapter_id).exists():
            return folder / adapter_id
    looked = "; load_checkpoint, beside which it could lie, is not set"
    for folder in beside:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())) if folder.is_dir() else ""
        looked = f", nor in {folder}" + (f", which holds {names}" if names else "")
    raise UserError(f"adapter_id: {adapter_id}: no such file or folder{looked}")


def read_adapter(path: str | Path, spec: DecoderSpec, wanted: Any = None) -> Adapter:
    """The adapter in `path`: a weight file, an output_dir or a folder of a run, or a Hugging Face PEFT folder.

    wanted: the run's pet_config, None = as the adapter itself says. Raises UserError when `path` holds no adapter or a
    damaged one, does not say how it was made (then pet_config must), does not fit `wanted` or the model, or holds what
    a run with `wanted` would not keep.
    """
    from llm_core.peft.hf_adapter import is_hf_adapter
    from llm_core.peft.hf_adapter import read_adapter as read_hf_adapter

    path = Path(path)
    if is_hf_adapter(path):
        made, tensors = read_hf_adapter(path, spec)
        facts: dict[str, Any] = {}
    else:
        weights = open_weights(path)
        try:
            facts = _facts(weights)
            made = _pet_of(facts.get("pet_config"), path)
            if not any(map(is_adapter_name, weights)):
                raise UserError(
                    f"adapter_id: {path}: there is no adapter in it, no name contains {ADAPTER_MARK}; give the weights "
                    "of a base model as load_checkpoint"
                )
            if made is None and wanted is None:
                raise UserError(
                    f"{path}: it does not say how this adapter was made (it has no manifest of a run): "
                    f"{_looks(weights)}. Add model.model_config.pet_config with its pet_type and values"
                )
            names = _names_of_adapter(weights, spec, [each for each in (wanted, made) if each is not None])
            tensors = {name: np.asarray(weights[name], np.float32) for name in names}
        finally:
            weights.close()
    if wanted is not None and made is not None:
        _require_same_kind(wanted, made, path)
    _require_fit(tensors, spec, wanted or made, path)
    _require_kept(tensors, spec, wanted or made, path)
    return Adapter(path, wanted or made, tensors, facts.get("base", ""), facts.get("base_fingerprint", {}))


def _names_of_adapter(weights: WeightFiles, spec: DecoderSpec, pets: Iterable[Any]) -> list[str]:
    """The adapter and what was trained beside it: all there is, or, beside a base, what runs with `pets` save."""
    names = without_state(weights)
    if _EMBEDDING not in names:
        return names
    return [name for name in names if any(is_saved(name, spec, pet) for pet in pets)]


def _facts(weights: WeightFiles) -> dict[str, Any]:
    """What the manifest of the file that holds the adapter says; every file is verified."""
    weights.verify()
    for file in weights.files:
        if any(map(is_adapter_name, file.heads)):
            version = verified_version(file.path)
            return {} if version is None else version.state.get("adapter", {})
    return {}


def pet_from_dict(values: Mapping[str, Any]) -> Any:
    """A pet_config from the mapping that a manifest holds. Raises pydantic's ValidationError."""
    from pydantic import TypeAdapter

    from llm_core.config.model_section import PetConfig

    return TypeAdapter(PetConfig).validate_python(dict(values))


def _pet_of(values: Mapping[str, Any] | None, path: Path) -> Any:
    if values is None:
        return None
    from pydantic import ValidationError

    try:
        return pet_from_dict(values)
    except ValidationError as error:
        raise UserError(f"{path}: the pet_config of its manifest cannot be read: {error.errors()[0]['msg']}") from None


def _looks(weights: Mapping[str, np.ndarray]) -> str:
    """What can be seen of an adapter without knowing how it was made."""
    ranks = {weights.heads[name].shape[0] for name in weights if name.endswith(lora.LORA_A)}
    if not ranks:
        return "its names are those of prefix tuning"
    leaves = dict.fromkeys(name.split(".")[-2] for name in weights if name.endswith(lora.LORA_A))
    return f"it is LoRA of rank {', '.join(map(str, sorted(ranks)))} on {', '.join(leaves)}"


def describe(pet: Any) -> str:
    """A few words for a log or an error."""
    if pet.pet_type == "lora":
        kind = "DoRA" if pet.use_dora else "rsLoRA" if pet.use_rslora else "LoRA"
        return f"{kind} of rank {pet.lora_rank}, alpha {pet.lora_alpha:g}, on {pet.target_modules}"
    return f"{pet.pet_type} of {getattr(pet, 'prefix_token_num', None) or pet.pre_seq_len} positions"


def _require_same_kind(wanted: Any, made: Any, path: Path) -> None:
    """UserError unless both compute the same from the same values."""
    names = ["pet_type"]
    if wanted.pet_type == made.pet_type == "lora":
        names += ["lora_rank", "lora_alpha", "use_rslora", "use_dora"]
    other = [name for name in names if getattr(wanted, name) != getattr(made, name)]
    if other:
        said = "; ".join(f"{name} is {getattr(made, name)} there and {getattr(wanted, name)} here" for name in other)
        raise UserError(
            f"adapter: {path}: another adapter than pet_config describes: {said}. Leave pet_config out (the adapter "
            "says itself how it was made), or change it"
        )


def _require_fit(tensors: Mapping[str, np.ndarray], spec: DecoderSpec, pet: Any, path: Path) -> None:
    """UserError unless the adapter's names and shapes are those that the model has, and none of its own is missing."""
    own = adapter_shapes(spec, pet)
    shapes = {**parameter_shapes(spec), **own}
    missing, unexpected = [n for n in own if n not in tensors], [n for n in tensors if n not in shapes]
    wrong = [
        f"{name} is {list(tensor.shape)}, here {list(shapes[name])}"
        for name, tensor in tensors.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}" + (" ..." if len(names) > _SHOWN else "")
        for what, names in (("of another shape", wrong), ("missing", missing), ("that this model lacks", unexpected))
        if names
    ]
    if problems:
        raise UserError(
            f"adapter: {path}: does not fit {describe(pet)} on this model: {'; '.join(problems)}. Check pet_config and "
            "model_config; an adapter belongs to one base"
        )


def _require_kept(tensors: Iterable[str], spec: DecoderSpec, pet: Any, path: Path) -> None:
    """UserError where the adapter holds weights of the model that a run with `pet` would neither train nor save."""
    left = [name for name in tensors if not is_saved(name, spec, pet)]
    if left:
        shown = ", ".join(left[:_SHOWN]) + (" ..." if len(left) > _SHOWN else "")
        patterns = left if len(left) <= _SHOWN else _patterns(left)
        raise UserError(
            f"adapter: {path}: it holds {shown}, trained beside the adapter, and pet_config would freeze and lose "
            f"{'it' if len(left) == 1 else 'them'}: add freeze_exclude: {patterns} to pet_config, or leave pet_config "
            "out where the adapter says itself how it was made"
        )


def _patterns(names: Iterable[str]) -> list[str]:
    """Patterns of freeze_exclude for many names: by their last two parts, whatever the layer."""
    return list(dict.fromkeys(f"*{'.'.join(name.split('.')[-2:])}" for name in names))


def require_head(missing: Iterable[str], spec: DecoderSpec, pet: Any, path: str) -> None:
    """UserError where the weights of load_checkpoint lack a classifier's head that `pet` freezes: it would stay as it
    was drawn, and in no checkpoint. missing: the parameters that are in no file."""
    frozen = [name for name in missing if pet is not None and not is_saved(name, spec, pet)]
    if frozen:
        raise UserError(
            f"load_checkpoint: {path}: it holds no {', '.join(frozen)}, the classifier's head, and "
            f"pet_config.freeze_include {pet.freeze_include} freezes it as it is drawn: take out the pattern that "
            "matches it, or give weights that hold the head"
        )


# ---- into a network


def load_adapter(
    net: nn.Cell, adapter: Adapter, share: Share | None = None, base: Mapping[str, str] | None = None
) -> None:
    """Set the parameters of `net`, which was built with `adapter.pet`, from the adapter's values.

    share: of what the rank holds whose net, or piece of one, this is. base: the fingerprint of the base in `net`
    (default: taken from the net).
    Raises UserError, before a value is set, when the base in `net` is another one than the adapter was trained on.
    """
    import mindspore

    if adapter.base_fingerprint:
        require_base(adapter, base_fingerprint(net, share) if base is None else base)
    parameters = net.parameters_dict()
    for name, tensor in adapter.tensors.items():
        box = (...,) if share is None else share.box(name, tensor.shape)
        if box is not None and (share is None or name in parameters):
            parameter = parameters[name]
            parameter.set_data(mindspore.Tensor(np.ascontiguousarray(tensor[box]), dtype=parameter.dtype))


def require_base(adapter: Adapter, found: Mapping[str, str]) -> None:
    """UserError unless the base of the fingerprint `found` is the one that the adapter was trained on."""
    others = differing(adapter.base_fingerprint, found)
    if others:
        trained_on = adapter.base or "a base that was never saved"
        raise UserError(
            f"adapter: {adapter.source}: it was trained on another base, {trained_on}, than the weights of "
            f"load_checkpoint ({len(others)} tensors differ: {', '.join(others[:_SHOWN])}): give that base as "
            "load_checkpoint"
        )


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The tensors that two fingerprints disagree on. What only one has says nothing: a head, or what a run trained."""
    return [name for name, value in one.items() if other.get(name, value) != value]


def base_alone(weights: WeightFiles, path: str) -> Mapping[str, np.ndarray]:
    """The base's weights of load_checkpoint, without an adapter's beside them; UserError where there is no base."""
    base = SelectedTensors(weights, [name for name in weights if not is_adapter_name(name)])
    if len(base) < len(weights) and _EMBEDDING not in base:
        facts = _facts(weights)
        trained_on = f" (it was trained on {facts['base']})" if facts.get("base") else ""
        raise UserError(
            f"load_checkpoint: {path}: an adapter without its base: give it as --adapter_id {path}, and the base as "
            f"load_checkpoint{trained_on}"
        )
    return base


@dataclass(frozen=True)
class BaseReport(LoadReport):
    """What `load_base` did. fingerprint: of the frozen parameters that it has set, of their whole tensors."""

    fingerprint: dict[str, str] = field(default_factory=dict)


def load_base(net: nn.Cell, path: str, share: Share | None = None, strategy: str = "") -> BaseReport:
    """`load_into` for load_checkpoint, verified: the base's weights; an adapter's beside them are for `load_adapter`.

    share: of what the net, a rank's, holds. strategy: as for `open_weights`.
    Raises UserError as it does, and where there is nothing but an adapter.
    """
    frozen, found = _frozen(net), {}

    def take(name: str, whole: np.ndarray) -> None:
        if name in frozen:
            found.update(fingerprint([(name, whole)]))

    weights = open_weights(path, strategy)
    try:
        weights.verify()
        report = load_into(net, base_alone(weights, path), source=path, share=share, seen=take)
    finally:
        weights.close()
    report.missing[:] = [name for name in report.missing if not is_adapter_name(name)]
    require_head(report.missing, net.spec, net.graph_key.get("adapter"), path)
    return BaseReport(**vars(report), fingerprint=found)


def base_fingerprint(net: nn.Cell, share: Share | None = None) -> dict[str, str]:
    """`fingerprint` of every frozen parameter of the base in `net`; of a rank's of those that it holds all of."""
    frozen = _frozen(net)
    whole = [name for name in frozen if share is None or share.whole(name) == tuple(frozen[name].shape)]
    return fingerprint((name, frozen[name].asnumpy()) for name in sorted(whole))


def _frozen(net: nn.Cell) -> dict[str, Any]:
    parameters = net.parameters_dict()
    return {name: p for name, p in parameters.items() if not p.requires_grad and not is_adapter_name(name)}


def fingerprint(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """By name, a short hash of each tensor's shape and some of its values.

    The values are rounded to bfloat16, so that a base and its bfloat16 copy are the same base.
    """
    return {name: _hash(array) for name, array in tensors}


def _hash(array: np.ndarray) -> str:
    values = array.reshape(-1)
    some = np.ascontiguousarray(values[:: max(1, len(values) // _SAMPLED)], dtype=np.float32)
    return hashlib.sha256(f"{tuple(array.shape)}".encode() + _bfloat16_bits(some).tobytes()).hexdigest()[:_HASH]


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> the nearest bfloat16 (ties to even), as uint16."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def adapter_state(pet: Any, load_checkpoint: str, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    """What a run's checkpoints say of its adapter, see above (JSON)."""
    return {"pet_config": pet.model_dump(), "base": load_checkpoint, "base_fingerprint": dict(fingerprint)}
