"""A model as deep as the real ones compiles: MindSpore counts every parameter's update as calls within calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llm_core.config import load_config
from llm_core.report.metrics import read_metrics
from llm_core.train.run import train


@pytest.mark.slow
def test_forty_layers_train(write_config: Callable[..., Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RUN_LLM_COMPILE_CACHE", "0")  # a graph from the cache would not be compiled
    overrides = [("model.model_config.num_layers", "40"), ("runner_config.stop_step", "2")]
    config = write_config(callbacks=[{"type": "MFLossMonitor"}])
    assert train(load_config(config, overrides)) == 0
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in entry]
    assert len(losses) == 2
