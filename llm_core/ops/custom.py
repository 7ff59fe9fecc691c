"""How a kernel of a library becomes a MindSpore operator."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspore import ops


def operator(
    library: Path, name: str, shapes: Callable[..., Any], dtypes: tuple, *, in_place: bool = False, **constants: int
) -> ops.Custom:
    """The operator that calls a kernel.

    Args:
        library: the file that holds it.
        name: of the kernel, see the sources in kernels/.
        shapes: called with the shapes of the inputs, gives the shape of the output, or a tuple of several.
        dtypes: of the outputs, a tuple in any case.
        in_place: the kernel writes to inputs. MindSpore must then neither leave it out because nobody looks at what
            it returns, nor move it before or behind another user of these inputs.
        constants: what `shapes` depends on beside the inputs. MindSpore remembers the shapes that an operator of this
            name gave for inputs of certain shapes; with these it tells one such operator from another.
    """
    os.environ["MS_CUSTOM_AOT_WHITE_LIST"] = str(library.parent)  # or every operator prints a warning
    made = ops.Custom(
        f"{library}:{name}", out_shape=shapes, out_dtype=dtypes if len(dtypes) > 1 else dtypes[0], func_type="aot"
    )
    for attribute, value in constants.items():
        made.add_prim_attr(attribute, value)
    if in_place:
        made.add_prim_attr("side_effect_mem", True)
    return made
