"""How a kernel of the library becomes a MindSpore operator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import ops

from llm_core.kernels import library


def bf16_refusal() -> str:
    """Why products of bfloat16 numbers cannot be had, "" if they can; they are then float32's."""
    isa = library().isa
    return "" if isa == "avx512_bf16" else f"the {isa} kernels have no others"


def kernel(
    name: str, shapes: Callable[..., Any], outputs: int = 1, *, in_place: bool = False, **constants: int
) -> ops.Custom:
    """The operator that calls a kernel, whose outputs are all float32.

    Args:
        name: of the kernel, see the sources in kernels/cpu.
        shapes: called with the shapes of the inputs, gives the shape of the output, or a tuple of several.
        outputs: how many there are.
        in_place: the kernel writes to inputs. MindSpore must then neither leave it out because nobody looks at what
            it returns, nor move it before or behind another user of these inputs.
        constants: what `shapes` depends on beside the inputs. MindSpore remembers the shapes that an operator of this
            name gave for inputs of certain shapes; with these it tells one such operator from another.
    """
    path = library().path
    os.environ["MS_CUSTOM_AOT_WHITE_LIST"] = str(path.parent)  # or every operator prints a warning
    dtypes = ms.float32 if outputs == 1 else (ms.float32,) * outputs
    operator = ops.Custom(f"{path}:{name}", out_shape=shapes, out_dtype=dtypes, func_type="aot")
    for attribute, value in constants.items():
        operator.add_prim_attr(attribute, value)
    if in_place:
        operator.add_prim_attr("side_effect_mem", True)
    return operator
