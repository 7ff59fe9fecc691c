"""Processes as the stages of a pipeline give what one process gives: losses, gradients, evaluation."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline_cases import CASES, CASES_OF_FOUR, Case, fill, window, zero_sums

from llm_core.parallel.layout import Layout, Place

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("pipeline_worker.py")


def launch(folder: Path, cases: dict[str, Case], ranks: int) -> dict[str, list[dict[str, np.ndarray]]]:
    """All cases in one launch of the worker; what its ranks have written, by case."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = f"python {shlex.quote(str(WORKER))} {shlex.quote(str(folder))}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/msrun_launcher.sh"), command, str(ranks), port, "logs", "True", "300"], cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        name: [dict(np.load(folder / f"{number}.rank_{rank}.npz")) for rank in range(ranks)]
        for number, name in enumerate(cases)
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), CASES, 2)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("four"), CASES_OF_FOUR, 4)


def of_one_process(case: Case) -> dict[str, np.ndarray]:
    """The same in this process, without a pipeline."""
    import mindspore as ms

    from llm_core.models.heads import TokenLoss
    from llm_core.peft.apply import build_net
    from llm_core.train.step import AccumulateStep

    ms.set_context(mode=ms.GRAPH_MODE)
    net = build_net(case.spec, case.pet, None)
    fill(net, case.cuts(Layout()), Layout(), Place(0, 0, 0))
    weights = ms.ParameterTuple(net.trainable_params())
    sums = zero_sums(weights)
    batches, per_token, scale = window()
    step = AccumulateStep(TokenLoss(net), weights, sums).set_train()
    losses = [float(step(*batch, per_token, scale).asnumpy()) for batch in batches]
    evaluated = TokenLoss(net)
    results = [[float(x.asnumpy()) for x in evaluated(tokens, labels)] for tokens, labels, _ in batches]
    gradients = {weight.name: total.asnumpy() for weight, total in zip(weights, sums, strict=True)}
    return {**gradients, "loss": np.array(sum(losses)), "short": np.array(losses[0]), "evaluated": np.array(results)}


def compare(case: Case, ranks: list[dict[str, np.ndarray]]) -> None:
    expected, layout = of_one_process(case), case.layout
    for name, cut in case.cuts(layout).items():
        for rank, own in enumerate(ranks):
            assert (name in own) == (name in expected and layout.place(rank).stage in cut.stages), name
            if name in own:  # what several ranks hold (tied, a prefix, with rows of their own) is summed over them
                total = sum(ranks[member][name] for member in cut.sum_group(layout, rank))
                close(total, cut.take(expected[name], layout, layout.place(rank), 3), name)
    for key in ("loss", "short", "evaluated"):
        for rank, own in enumerate(ranks):
            if layout.place(rank).stage == layout.pp - 1:
                close(own[key], expected[key], key)
            else:
                assert not own[key].any(), key


def close(ours: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert np.any(expected), name
    assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected), name


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_process_gives(of_two, name):
    compare(CASES[name], of_two[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES_OF_FOUR)
def test_four_ranks_give_what_one_process_gives(of_four, name):
    compare(CASES_OF_FOUR[name], of_four[name])
