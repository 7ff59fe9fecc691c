"""Whole runs from scratch of families other than Llama: they learn, and what they save is a model that loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_core.checkpoint.weights import read_weights
from llm_core.config import load_config
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import spec_from_config
from llm_core.report.metrics import read_metrics
from llm_core.train.check import check
from llm_core.train.run import train

RUNS = {
    "falcon_rw": ("Falcon", {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False}),
    "falcon_40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_dropout_rate": 0.05}),
    "internlm": ("InternLM", {"intermediate_size": 48}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_family_trains_from_scratch(write_config: Callable[..., Path], tmp_path: Path, name: str) -> None:
    family, changes = RUNS[name]
    config = write_config(
        model={
            "arch": {"type": f"{family}ForCausalLM"},
            "model_config": {
                "type": f"{family}Config", "seq_length": 24, "vocab_size": 96, "hidden_size": 32, "num_layers": 1,
                "num_heads": 4, "pad_token_id": 0, **changes,
            },
        },
        callbacks=[{"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 21}],
    )  # fmt: skip
    assert train(load_config(config)) == 0
    out = tmp_path / "out"
    losses = [entry["loss"] for entry in read_metrics(out / "metrics.jsonl") if "loss" in entry]
    assert len(losses) == 21 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])

    path = out / "checkpoint/rank_0/tiny_rank_0-1_21.safetensors"
    saved = read_weights(path)
    expected = parameter_shapes(spec_from_config(load_config(config).config.model))
    assert {name: saved[name].shape for name in expected} == expected
    assert check(load_config(config, [("load_checkpoint", str(path)), ("output_dir", str(tmp_path / "new"))])) == 0
