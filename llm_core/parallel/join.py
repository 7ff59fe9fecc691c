"""How a process becomes one of the ranks of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_core.parallel.layout import layout_from_config
from llm_core.runtime import add_to_graph_keys, after_compiling, start

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm


def join_ranks(config: Any) -> Comm | None:
    """Meet the other ranks of the run that `config` (a `RunConfig`) describes; None for a run of one process.

    Starts MindSpore. UserError where the started processes do not make up the layout.
    """
    layout = layout_from_config(config)
    if layout.world == 1:
        return None
    start(config)
    from llm_core.parallel.comm import Comm

    comm = Comm(layout)
    add_to_graph_keys("layout", (layout, comm.rank))
    if layout.pp == 1:  # stages of a pipeline compile different graphs: its executor lets them meet
        after_compiling(comm.gate)
    return comm
