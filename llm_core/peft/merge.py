"""LoRA merged into its base: the weights of a plain model that computes the same.

    W + scaling B A                                   LoRA, rsLoRA
    magnitude / |W + scaling B A| (W + scaling B A)   DoRA; |.| is the length of a row

In float32, a tensor at a time. `merge_files` trusts none of it: it computes logits with the adapter beside the base and
with the merged weights, and refuses to write what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.checkpoint.dtypes import BY_NAME, FLAG_NAMES, Head, check_fits, decode, encode
from llm_core.checkpoint.files import WRITABLE, file_size, write_tensors
from llm_core.checkpoint.hf_config import hf_config_metadata
from llm_core.checkpoint.manifest import Version, commit_with_manifest
from llm_core.checkpoint.qkv import ConcatView, heads_of
from llm_core.checkpoint.staged import StagedFile
from llm_core.checkpoint.state_names import without_state
from llm_core.checkpoint.weights import LazyTensors, SelectedTensors, WeightFiles, load_into, open_weights
from llm_core.errors import UserError
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec
from llm_core.peft.adapters import Adapter, fingerprint, load_adapter, load_base, require_base
from llm_core.peft.apply import build_net, is_adapter_name, is_trainable
from llm_core.peft.lora import LORA_A, LORA_B, MAGNITUDE, scaling

DRIFT = 1e-5  # ||before - after|| / ||before|| of the logits that is still rounding
_ROWS, _LENGTH = 2, 16  # of the token rows that are compared
_SHOWN = 4
_FP32 = BY_NAME["float32"]


# ---- the weights


def merge_lora(base: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], pet: Any) -> Mapping[str, np.ndarray]:
    """The base's weights, under the names it has, with the adapter merged in; each is computed when it is asked for.

    base: of any storage type, with joined or split projections, whichever the adapter has. adapter: arrays under our
    names; what is no factor of a LoRA (a classifier's head, a norm that was trained as well) takes the base's place.
    pet: the adapter's LoraConfig. Changed weights are float32. Raises UserError for an adapter of another rank, of
    another model, or that is no LoRA, and for an adapter's tensors in `base`.
    """
    if getattr(pet, "pet_type", None) != "lora":
        raise UserError(f"only LoRA can be merged, and this is {getattr(pet, 'pet_type', 'no adapter')}")
    left = [name for name in base if is_adapter_name(name)]
    if left:
        raise UserError(f"the base holds {len(left)} tensors of an adapter, which would stay unmerged: {_first(left)}")
    merged = _Merged(base, adapter, pet)
    return ConcatView(merged, set(heads_of(base)) | set(merged.whole))


class _Merged(LazyTensors):
    """The base as the adapter has its projections, with the adapter merged in."""

    def __init__(self, base: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], pet: Any):
        self._adapter, self._pet = adapter, pet
        factors = [name for name in adapter if is_adapter_name(name)]
        self._changed = {f"{name.removesuffix(f'.{LORA_A}')}.weight" for name in factors if name.endswith(LORA_A)}
        self.whole = [name for name in adapter if name not in factors]
        self._base = ConcatView(base, self._changed)
        self.heads = dict(self._base.heads)
        self._check(factors)
        self.heads |= {name: Head(_FP32, self.heads[name].shape) for name in self._changed}
        self.heads |= {name: Head(_FP32, tuple(adapter[name].shape)) for name in self.whole}

    def _check(self, factors: list[str]) -> None:
        """Every factor has its use, and fits."""
        kinds = (LORA_A, LORA_B) + ((MAGNITUDE,) if self._pet.use_dora else ())
        used = {self._factor(weight, kind) for weight in self._changed for kind in kinds}
        left, missing = sorted(set(factors) - used), sorted(used - set(factors))
        if left or missing or not used:
            problems = [f"holds {_first(left)}, which has no use"] if left else []
            problems += [f"lacks {_first(missing)}, which is needed"] if missing else []
            what = " and ".join(problems) or "holds no LoRA"
            raise UserError(f"the adapter {what} (use_dora: {self._pet.use_dora})")
        foreign = sorted(weight for weight in self._changed if weight not in self._base)
        if foreign:
            raise UserError(f"the adapter is for another model: the base has no {_first(foreign)}")
        for weight in sorted(self._changed):
            self._check_shapes(weight)
        for name in self.whole:
            if name in self.heads and self.heads[name].shape != tuple(self._adapter[name].shape):
                raise UserError(
                    f"the adapter is for another model: {name} is {list(self._adapter[name].shape)} in it and "
                    f"{list(self.heads[name].shape)} in the base"
                )

    def _check_shapes(self, weight: str) -> None:
        a, b = self._adapter[self._factor(weight, LORA_A)], self._adapter[self._factor(weight, LORA_B)]
        if not len(a) == b.shape[1] == self._pet.lora_rank:
            raise UserError(
                f"an adapter of another rank: {weight.removesuffix('.weight')} has rank {len(a)}, and pet_config says "
                f"lora_rank {self._pet.lora_rank}"
            )
        if (len(b), a.shape[1]) != self.heads[weight].shape:
            raise UserError(
                f"the adapter is for another model: for {weight} it is {[len(b), a.shape[1]]}, and the base's is "
                f"{list(self.heads[weight].shape)}"
            )

    @staticmethod
    def _factor(weight: str, kind: str) -> str:
        return f"{weight.removesuffix('.weight')}.{kind}"

    def __getitem__(self, name: str) -> np.ndarray:
        weight = np.asarray(self._adapter[name], np.float32) if name in self.whole else self._base[name]
        if name not in self._changed:
            return weight
        a, b = (np.asarray(self._adapter[self._factor(name, kind)], np.float32) for kind in (LORA_A, LORA_B))
        total = (b * np.float32(scaling(self._pet))) @ a
        total += weight.astype(np.float32, copy=False)
        if self._pet.use_dora:
            magnitude = np.asarray(self._adapter[self._factor(name, MAGNITUDE)], np.float32)
            total *= (magnitude / np.linalg.norm(total, axis=1))[:, None]
        return total


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


# ---- files


@dataclass(frozen=True)
class Merge:
    """What was merged: the file, how many layers, their scaling, and how far the logits moved (relative, None: not
    looked at), by merging and by the storage type's rounding."""

    path: Path
    layers: int
    scaling: float
    drift: float | None
    rounding: float | None

    def line(self) -> str:
        """One line for the log."""
        text = f"{self.path}: {self.layers} layers merged with scaling {self.scaling:g}"
        if self.drift is None:
            return f"{text}; logits not compared"
        text += f"; logits moved by {self.drift:.1e} (limit {DRIFT:g})"
        return text if self.rounding is None else f"{text}, and by {self.rounding:.1e} with the rounding to its type"


def merge_files(
    spec: DecoderSpec, base: str | Path, adapter: Adapter, target: str | Path, dtype: str = "fp32", compare: bool = True
) -> Merge:
    """Merge `adapter` into the weights of `base` and write them as one file under MindFormers' names, with a manifest.

    base: anything `open_weights` takes; it may hold the adapter beside the base, if that is the one merged. target: a
    .safetensors or .ckpt file. dtype: fp32, bf16 or fp16, of all floating weights. compare: build both models, whole
    and in float32, and compare their logits; MindSpore must have been set up. UserError for what does not fit, and for
    logits that moved by more than DRIFT; then nothing is written.
    """
    target = Path(target)
    if target.suffix not in WRITABLE:
        raise UserError(f"{target}: the name of the merged file must end in {' or '.join(WRITABLE)}")
    weights = open_weights(base)
    try:
        weights.verify()
        try:
            own = _base_alone(weights, Path(base), adapter)
            merged = merge_lora(own, adapter.tensors, adapter.pet)
        except UserError as error:
            raise UserError(f"{adapter.source} into {base}: {error}") from None
        heads = {name: _as_type(head, dtype) for name, head in merged.heads.items()}
        stored = _Stored(merged, heads)
        drift = rounding = None
        if not compare:
            _require_base(own, spec, adapter)
        else:
            drift, rounding = _compare(spec, base, adapter, merged, stored if dtype != "fp32" else None)
        metadata = {"format": "ms", **hf_config_metadata(base, weights)}
        with StagedFile(target, file_size(target.suffix, heads, metadata)) as staged:
            write_tensors(staged, heads, lambda name: _fitting(name, merged[name], heads[name]), metadata)
            commit_with_manifest(staged, Version(staged.sha256, staged.size))
    finally:
        weights.close()
    layers = sum(name.endswith(LORA_A) for name in adapter.tensors)
    return Merge(target, layers, scaling(adapter.pet), drift, rounding)


def _base_alone(weights: WeightFiles, base: Path, adapter: Adapter) -> SelectedTensors:
    """The base's own weights: no optimizer state, and not the adapter itself, where both lie in one place."""
    names = without_state(weights)
    inside = [name for name in names if is_adapter_name(name)]
    if inside and base.resolve() != adapter.source.resolve():
        raise UserError(
            f"the base holds an adapter of its own ({_first(inside)}), which would stay unmerged; name the base alone, "
            "or merge that adapter first"
        )
    return SelectedTensors(weights, [name for name in names if name not in inside])


def _require_base(base: Mapping[str, np.ndarray], spec: DecoderSpec, adapter: Adapter) -> None:
    """As loading the adapter into a network does: UserError for another base than it was trained on."""
    if not adapter.base_fingerprint:
        return
    shapes = parameter_shapes(spec)
    view = ConcatView(base, shapes)
    frozen = sorted(name for name in shapes if name in view and not is_trainable(name, spec, adapter.pet))
    require_base(adapter, fingerprint((name, view[name]) for name in frozen))


def _fitting(name: str, array: np.ndarray, head: Head) -> np.ndarray:
    check_fits(name, array, head.dtype)
    return array


def _as_type(head: Head, dtype: str) -> Head:
    return replace(head, dtype=BY_NAME[FLAG_NAMES[dtype]]) if head.dtype.floating else head


class _Stored(LazyTensors):
    """Tensors as they come back from a file of the types in `heads`."""

    def __init__(self, tensors: Mapping[str, np.ndarray], heads: Mapping[str, Head]):
        self._tensors, self.heads = tensors, heads

    def __getitem__(self, name: str) -> np.ndarray:
        head = self.heads[name]
        array = _fitting(name, self._tensors[name], head)
        return decode(encode(array, head.dtype), head.dtype, head.shape)


# ---- logits before and after


def _compare(
    spec: DecoderSpec, base: str | Path, adapter: Adapter, merged: Mapping, stored: Mapping | None
) -> tuple[float, float | None]:
    """How far (relative) the logits of the merged weights are from those with the adapter, and of the stored ones.

    All products are float32, whatever the run's types: bfloat16's rounding is above DRIFT.
    """
    spec = replace(spec, compute_dtype="float32")
    pet = adapter.pet.model_copy(update={"compute_dtype": "float32"})
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (_ROWS, min(_LENGTH, spec.max_position)))
    tokens = tokens.astype(np.int32)
    net = build_net(spec, pet, seed=None)
    load_base(net, str(base))
    load_adapter(net, adapter)
    before = _logits(net, tokens)
    del net  # at most one model is in memory
    net = build_net(spec, None, seed=None)
    load_into(net, merged, source="the merged weights")
    drift = _distance(_logits(net, tokens), before)
    if not drift <= DRIFT:
        raise UserError(
            f"{adapter.source}: merged into {base}, the logits move by {drift:.2e} (relative; at most {DRIFT:g} is "
            "rounding). The merged weights would be another model, and nothing was written"
        )
    if stored is None:
        return drift, None
    load_into(net, stored, source="the merged weights")
    return drift, _distance(_logits(net, tokens), before)


def _logits(net: Any, tokens: np.ndarray) -> np.ndarray:
    """Of every head: tokens int32 [B, S] -> fp32 [B * S, V or labels]."""
    from mindspore import Tensor, nn

    class Logits(nn.Cell):
        """The head on the decoder's hidden states."""

        def __init__(self, net: nn.Cell):
            super().__init__(auto_prefix=False)
            self.net = net

        def construct(self, tokens: Tensor) -> Tensor:
            return self.net.head(self.net.model(tokens))

    return Logits(net.set_train(False))(Tensor(tokens)).asnumpy()


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))
