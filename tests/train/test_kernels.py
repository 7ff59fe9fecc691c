"""Whole runs on the kernels, on the reference, and without a compiler: the same losses, and a log that says which."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core import kernels
from llm_core.report.metrics import read_metrics
from llm_core.runtime import cache_dir

ROOT = Path(__file__).resolve().parents[2]
STEPS = 50


@pytest.fixture(scope="module", autouse=True)
def library():
    """Without kernels there is nothing to compare."""
    try:
        return kernels.library()
    except kernels.KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def finished() -> dict[str, tuple[list[float], str]]:
    """Results of runs that more than one test looks at, by name."""
    return {}


@pytest.fixture
def train(write_config, tmp_path):
    """train(name, overrides of write_config, **environment) -> (losses of the steps, the log)."""

    def run(name: str, overrides: dict | None = None, **environment: str) -> tuple[list[float], str]:
        output = tmp_path / name
        settings = {"output_dir": str(output), "runner_config__epochs": 3, "runner_config__stop_step": STEPS}
        config = write_config(**{**settings, "callbacks": [{"type": "MFLossMonitor"}], **(overrides or {})})
        result = subprocess.run(
            [sys.executable, str(ROOT / "run_llm.py"), "--config", str(config)],
            capture_output=True, text=True, timeout=600, env={**os.environ, **environment},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        entries = read_metrics(output / "metrics.jsonl")
        return [entry["loss"] for entry in entries if "loss" in entry], result.stderr

    return run


def default_run(train, finished) -> tuple[list[float], str]:
    """The 50 steps on the best kernels in float32."""
    if "float32" not in finished:
        finished["float32"] = train("float32")
    return finished["float32"]


def kernels_line(log: str) -> str:
    (line,) = [line for line in log.splitlines() if "kernels: " in line]
    return line


def test_kernels_and_reference_give_the_same_losses(train, finished, library):
    ours, log = default_run(train, finished)
    assert f"kernels: cpu ({library.isa}, " in kernels_line(log)
    theirs, log = train("reference", KERNELS="reference")
    assert "kernels: reference (KERNELS=reference)" in kernels_line(log)
    assert len(ours) == len(theirs) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-4
    assert ours != theirs  # something else has run


def test_without_a_compiler_the_reference_runs_and_says_why(train, tmp_path):
    few = {"runner_config__stop_step": 2}
    _, log = train("none", few, CXX="/bin/false", RUN_LLM_CACHE=str(tmp_path / "empty"))
    line = kernels_line(log)
    assert "kernels: reference (" in line and "/bin/false" in line


def test_dropped_attention_weights_are_the_references(train):
    few = {"runner_config__stop_step": 2, "model__model_config__attention_dropout_rate": 0.1}
    _, log = train("dropout", few)
    assert "attention: reference, since attention_dropout_rate is above 0" in kernels_line(log)


def test_a_second_start_takes_the_compiled_graph_with_its_kernels(train, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernels").symlink_to(cache_dir() / "kernels")
    few = {"runner_config__stop_step": 5}
    first, _ = train("first", few, RUN_LLM_CACHE=str(cache))
    graphs = {path: path.stat().st_mtime_ns for path in (cache / "graphs").glob("*/*.mindir")}
    assert graphs
    second, _ = train("second", few, RUN_LLM_CACHE=str(cache))
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in (cache / "graphs").glob("*/*.mindir")} == graphs
    train("reference", few, RUN_LLM_CACHE=str(cache), KERNELS="reference")  # these are other graphs
    assert len(list((cache / "graphs").glob("*/*.mindir"))) == 2 * len(graphs)


def test_bfloat16_products(train, finished, library):
    if library.isa != "avx512_bf16":
        pytest.skip("these kernels have no bfloat16 products")
    wide, _ = default_run(train, finished)
    narrow, log = train("bfloat16", {"model__model_config__compute_dtype": "bfloat16"})
    assert "products: bfloat16" in kernels_line(log)
    assert wide != narrow
    assert max(abs(a - b) for a, b in zip(wide, narrow, strict=True)) <= 0.03
    _, log = train("reference", {"model__model_config__compute_dtype": "bfloat16"}, KERNELS="reference")
    assert "compute_dtype: bfloat16 -> float32" in log
