"""How a process becomes one of the ranks of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_core.parallel.layout import layout_from_config
from llm_core.runtime import add_to_graph_keys, after_compiling, start

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm


def join_ranks(config: Any, inference: bool = False) -> Comm | None:
    """Meet the other ranks of the run that `config` (a `RunConfig`) describes; None for a run of one process.

    inference: nothing is trained, so there is nothing for ZeRO to cut, and a token is not cut by rows; and replicas
    answer different prompts, for which they compile different graphs, so that after compiling only the ranks of a
    replica wait for each other.
    Starts MindSpore. UserError where the started processes do not make up the layout.
    """
    layout = layout_from_config(config)
    if inference:
        layout = replace(layout, zero=0, sequence_parallel=False)
    if layout.world == 1:
        return None
    start(config)
    from llm_core.parallel.comm import Comm

    comm = Comm(layout)
    add_to_graph_keys("layout", (layout, comm.rank))
    alike = layout.shards(comm.rank) if inference else comm.world
    if layout.pp == 1 and len(alike) > 1:
        after_compiling(lambda: comm.gate(group=alike))
    else:  # stages of a pipeline compile different graphs: its executor lets them meet
        after_compiling(lambda: None)
    return comm
