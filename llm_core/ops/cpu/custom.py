"""How a kernel of the library becomes a MindSpore operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import ops

from llm_core.kernels import library
from llm_core.ops.custom import operator


def bf16_refusal() -> str:
    """Why products of bfloat16 numbers cannot be had, "" if they can; they are then float32's."""
    isa = library().isa
    return "" if isa == "avx512_bf16" else f"the {isa} kernels have no others"


def kernel(
    name: str, shapes: Callable[..., Any], outputs: int = 1, *, in_place: bool = False, **constants: int
) -> ops.Custom:
    """The operator that calls a kernel of kernels/cpu, whose outputs are all float32; arguments as in `operator`."""
    return operator(library().path, name, shapes, (ms.float32,) * outputs, in_place=in_place, **constants)
