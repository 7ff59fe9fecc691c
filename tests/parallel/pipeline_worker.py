"""What each of two or four ranks does: all cases for so many through a pipeline, one after the other.

    pipeline_worker.py FOLDER      what came out goes into FOLDER/NUMBER.rank_R.npz
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llm_core.runtime import prepare_environment

prepare_environment()

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from pipeline_cases import CASES, CASES_OF_FOUR, Case, fill, window, zero_sums  # noqa: E402

from llm_core.models.decoder import Piece  # noqa: E402
from llm_core.parallel.comm import Comm  # noqa: E402
from llm_core.parallel.pipeline import PipelineAccumulator, PipelineEvaluator, share_prefix  # noqa: E402
from llm_core.parallel.tensor import ParallelParts  # noqa: E402
from llm_core.peft.apply import build_net  # noqa: E402


def pieces(case: Case, comm: Comm) -> list:
    """What this rank holds of the model, a net a chunk."""
    layout, cuts = comm.layout, case.cuts(comm.layout)
    ranges = layout.pieces(case.spec.num_layers)
    nets = []
    for number in range(comm.place.stage, len(ranges), layout.pp):
        piece = Piece(tuple(ranges[number]), first=number == 0, last=number == len(ranges) - 1)
        nets.append(build_net(case.spec, case.pet, None, parts=ParallelParts(case.spec, comm, cuts), piece=piece))
        fill(nets[-1], cuts, layout, comm.place)
    share_prefix(nets)
    return nets


def run(case: Case, comm: Comm) -> dict[str, np.ndarray]:
    """Gradients by name, the loss of two windows (the second a short one), and the evaluation."""
    nets = pieces(case, comm)
    found = {id(weight): weight for net in nets for weight in net.trainable_params()}
    weights = ms.ParameterTuple(found.values())
    sums = zero_sums(weights)
    batches, per_token, scale = window()
    accumulator = PipelineAccumulator(nets, weights, sums, comm)
    accumulator.prepare(batches[0], per_token, scale)
    comm.gate()
    loss = accumulator.run(batches, per_token, scale)
    gradients = {weight.name: total.asnumpy().copy() for weight, total in zip(weights, sums, strict=True)}
    short = accumulator.run(batches[:1], per_token, scale)
    results = PipelineEvaluator(nets, comm).evaluate([(tokens, labels) for tokens, labels, _ in batches])
    return {**gradients, "loss": np.array(loss), "short": np.array(short), "evaluated": np.array(results)}


def main(folder: Path) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    cases = CASES_OF_FOUR if os.environ["MS_WORKER_NUM"] == "4" else CASES
    comm = None
    for number, (name, case) in enumerate(cases.items()):
        if comm is None:
            comm = Comm(case.layout)
        else:  # the same processes in another layout
            comm.layout, comm.place = case.layout, case.layout.place(comm.rank)
        print(name, flush=True)
        np.savez(folder / f"{number}.rank_{comm.rank}.npz", **run(case, comm))
    comm.gate()


main(Path(sys.argv[1]))
