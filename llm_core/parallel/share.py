"""Which pieces of a model a rank holds, as arguments of `peft.apply.build_net`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_core.models.decoder import Piece
from llm_core.models.spec import DecoderSpec
from llm_core.parallel.comm import Comm
from llm_core.parallel.cuts import Cut
from llm_core.parallel.tensor import ParallelParts


def own_pieces(spec: DecoderSpec, comm: Comm, cuts: Mapping[str, Cut]) -> list[dict[str, Any]]:
    """The `parts` and `piece` of each network of this rank: one, or with interleaved stages several, in the model's
    order. cuts: see `cut_parameters`."""
    pieces = comm.layout.pieces(spec.num_layers)
    own = range(comm.place.stage, len(pieces), comm.layout.pp)
    last = len(pieces) - 1
    return [
        {"parts": ParallelParts(spec, comm, cuts), "piece": Piece(tuple(pieces[i]), first=i == 0, last=i == last)}
        for i in own
    ]
