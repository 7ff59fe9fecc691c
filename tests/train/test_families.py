"""Whole runs of families other than Llama: they learn, and what they save is a model that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_core.checkpoint.convert import to_hugging_face
from llm_core.checkpoint.weights import read_weights
from llm_core.config import load_config
from llm_core.config.hf_folder import hf_config_to_model_config
from llm_core.config.model_section import ModelSection
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


def test_from_a_hugging_face_folder_and_back_into_one(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A Falcon's folder is trained as it is, under a Llama's run file; what the run saves becomes a folder again."""
    hf = {
        "model_type": "falcon", "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1,
        "new_decoder_architecture": True, "num_kv_heads": 2, "max_position_embeddings": 24,
    }  # fmt: skip
    start, out = tmp_path / "start", tmp_path / "out"
    ours = hf_config_to_model_config(hf)
    section = ModelSection.model_validate({"arch": {"type": "FalconForCausalLM"}, "model_config": ours})
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(float("norm" in name and name.endswith("weight")), 0.1, shape).astype(np.float32)
        for name, shape in parameter_shapes(spec_from_config(section)).items()
    }
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    to_hugging_face(tmp_path / "weights.safetensors", start, config=tmp_path / "config.json")

    config = write_config(load_checkpoint=str(start), runner_config={"epochs": 1, "batch_size": 42})
    assert train(load_config(config)) == 0
    back = to_hugging_face(out, tmp_path / "back", config=out / "run" / "config.yaml")
    before, after = read_weights(start), read_weights(back)
    assert {name: array.shape for name, array in after.items()} == {name: w.shape for name, w in before.items()}
    assert all((after[name] != before[name]).any() for name in before)
    assert hf_config_to_model_config(json.loads((back / "config.json").read_text())) == {
        **hf_config_to_model_config(json.loads((start / "config.json").read_text())),
        "ffn_hidden_size": 128, "initializer_range": 0.02, "pad_token_id": 0,
    }  # fmt: skip
