"""Two processes as the stages of a pipeline give what one process gives: losses, gradients, evaluation."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipeline_cases import CASES, fill, window, zero_sums

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("pipeline_worker.py")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """What the worker's ranks have written: case -> [of rank 0, of rank 1]. One launch for all cases."""
    folder = tmp_path_factory.mktemp("pipeline")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    command = f"python {shlex.quote(str(WORKER))} {shlex.quote(str(folder))}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/msrun_launcher.sh"), command, "2", port, "logs", "True", "300"], cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        name: [dict(np.load(folder / f"{number}.rank_{rank}.npz")) for rank in range(2)]
        for number, name in enumerate(CASES)
    }


def of_one_process(case) -> dict[str, np.ndarray]:
    """The same in this process, without a pipeline."""
    import mindspore as ms

    from llm_core.models.heads import TokenLoss
    from llm_core.peft.apply import build_net
    from llm_core.train.step import AccumulateStep

    ms.set_context(mode=ms.GRAPH_MODE)
    net = build_net(case.spec, case.pet, None)
    fill(net)
    weights = ms.ParameterTuple(net.trainable_params())
    sums = zero_sums(weights)
    batches, per_token, scale = window()
    step = AccumulateStep(TokenLoss(net), weights, sums).set_train()
    losses = [float(step(*batch, per_token, scale).asnumpy()) for batch in batches]
    evaluated = TokenLoss(net)
    results = [[float(x.asnumpy()) for x in evaluated(tokens, labels)] for tokens, labels, _ in batches]
    gradients = {weight.name: total.asnumpy() for weight, total in zip(weights, sums, strict=True)}
    return {**gradients, "loss": np.array(sum(losses)), "short": np.array(losses[0]), "evaluated": np.array(results)}


@pytest.mark.parametrize("name", CASES)
def test_two_stages_give_what_one_process_gives(by_rank, name):
    expected = of_one_process(CASES[name])
    ranks = by_rank[name]
    assert set(expected) == set(ranks[0]) | set(ranks[1])
    for key, value in expected.items():  # what both stages hold (tied, a prefix) is the sum of both
        total = sum(rank[key] for rank in ranks if key in rank)
        assert np.linalg.norm(total - value) <= 1e-6 * np.linalg.norm(value), key
        assert np.any(value), key
    assert not any(ranks[0][key].any() for key in ("loss", "short", "evaluated"))  # the last stage's alone
