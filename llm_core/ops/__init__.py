"""One operator a call: norm, rotary positions, activation, attention, products, token loss, dropout, Adam's update.

The model, the loss and the optimizer build these operators once and call them; which implementation stands behind a
name is decided here, once a process, when the first of them is asked for:

    cpu        the C++ kernels of llm_core/kernels, as MindSpore's custom operators
    cuda       attention by the CUDA kernels of llm_core/kernels; the rest is the reference's
    ascend     MindSpore's fused operators for Ascend
    reference  plain MindSpore operators, which run on every device; the oracle that the others are tested against

An implementation is a package with every name of the reference's. One that does not take a shape hands out the
reference's Cell for it; `describe` says so.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from llm_core import kernels, runtime
from llm_core.ops import reference
from llm_core.ops.reference.dropout import DropoutMask, dropout_key

OPERATORS = tuple(name for name in reference.__all__ if not name.endswith("_refusal"))
__all__ = [
    "OPERATORS", "Backend", "DropoutMask", "backend", "decode_layer", "describe", "dropout_key", *OPERATORS,
]  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """The implementation in use: its name, why it is that one, its package, the file of its kernels if it has any."""

    name: str
    reason: str
    operators: ModuleType
    library: Path | None = None


def __getattr__(name: str) -> Any:
    """The operator of that name, of the implementation in use."""
    if name in OPERATORS:
        return getattr(backend().operators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def backend() -> Backend:
    """The implementation that this process uses; builds the kernels if need be. The device must be set by now."""
    chosen = _choose()
    # A compiled graph holds the path of its operators' library, whose name changes with its sources.
    runtime.add_to_graph_keys("operators", [chosen.name, str(chosen.library)])
    return chosen


def decode_layer(eps: float) -> Any:
    """The Cell that computes a whole decoder layer for one new token, or None where there is none of the kind."""
    made = getattr(backend().operators, "DecodeLayer", None)
    return None if made is None else made(eps)


def _choose() -> Backend:
    import mindspore as ms

    device = ms.get_context("device_target")
    if device == "Ascend":  # not verified here: there is no such device
        if os.environ.get("KERNELS") == "reference":
            return _backend("reference", "KERNELS=reference")
        return _backend("ascend", "MindSpore's fused operators, not verified on a device; attention in bfloat16")
    try:
        if device == "GPU":  # not verified here: MindSpore has no wheel for such a device
            library = kernels.cuda_library()
            return _backend("cuda", "CUDA kernels, not verified on a device", library.path)
        library = kernels.library()
    except kernels.KernelsUnavailable as error:
        return _backend("reference", str(error))
    return _backend("cpu", f"{library.isa}, {library.why}; {library.threads()} threads", library.path)


def _backend(name: str, reason: str, library: Path | None = None) -> Backend:
    return Backend(name, reason, importlib.import_module(f"llm_core.ops.{name}"), library)


def describe(*, head_dim: int, attention_dropout: float, bf16: bool) -> str:
    """One line for a run's log: which operators run and why, for a model with such attention and products."""
    chosen = backend()
    parts = [f"kernels: {chosen.name} ({chosen.reason})"]
    if refusal := chosen.operators.attention_refusal(head_dim, attention_dropout > 0):
        parts.append(f"attention: reference, since {refusal}")
    if bf16:
        refusal = chosen.operators.bf16_refusal()
        parts.append(f"products: float32, since {refusal}" if refusal else "products: bfloat16, sums float32")
    return "; ".join(parts)
