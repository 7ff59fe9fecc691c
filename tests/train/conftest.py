"""A tiny model and a tiny data set, for runs of a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SEQ_LENGTH, VOCAB = 24, 96


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 records of a repeating pattern (a model can learn it), some with padding, one (number 40) of noise."""
    from llm_core.data.records import RecordWriter

    rng = np.random.default_rng(7)
    rows = (np.arange(SEQ_LENGTH + 1)[None] * 5 + rng.integers(0, 16, (84, 1))) % 17 + 3
    rows[40] = rng.integers(60, VOCAB, SEQ_LENGTH + 1)
    labels = rows.copy()
    for number in range(0, 84, 3):  # unequal numbers of supervised tokens, a row without any among them
        keep = int(rng.integers(0, SEQ_LENGTH)) if number else 0
        rows[number, keep + 1 :] = 0
        labels[number, keep + 1 :] = -100
    path = tmp_path_factory.mktemp("records") / "tiny.mindrecord"
    with RecordWriter(path, columns={"input_ids": SEQ_LENGTH + 1, "labels": SEQ_LENGTH + 1}, manifest={}) as writer:
        writer.write_rows({"input_ids": rows.astype(np.int32), "labels": labels.astype(np.int32)})
    return path


@pytest.fixture
def write_config(records: Path, tmp_path: Path) -> Callable[..., Path]:
    """write_config(**overrides) -> the path of a YAML for a run of a few seconds; overrides are dotted keys."""

    def write(**overrides: object) -> Path:
        import yaml

        config = {
            "seed": 3,
            "run_mode": "train",
            "output_dir": str(tmp_path / "out"),
            "use_parallel": False,
            "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "tiny"},
            "runner_config": {"epochs": 1, "batch_size": 4, "sink_mode": False, "gradient_accumulation_steps": 1},
            "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
            "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 0.01, "warmup_steps": 2, "lr_end": 0.001},
            "train_dataset": {
                "data_loader": {"type": "MindDataset", "dataset_dir": str(records), "shuffle": True},
                "input_columns": ["input_ids", "labels"],
                "drop_remainder": False,
            },
            "runner_wrapper": {"type": "MFTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True},
            "callbacks": [
                {"type": "MFLossMonitor"},
                {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 1, "keep_checkpoint_max": 100},
            ],
            "context": {"mode": 0, "device_target": "CPU"},
            "model": {
                "arch": {"type": "LlamaForCausalLM"},
                "model_config": {
                    "type": "LlamaConfig", "seq_length": SEQ_LENGTH, "vocab_size": VOCAB, "hidden_size": 32,
                    "num_layers": 1, "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 48, "pad_token_id": 0,
                    "compute_dtype": "float32", "param_init_type": "float32", "softmax_compute_type": "float32",
                    "rotary_dtype": "float32",
                },
            },
        }
        for dotted, value in overrides.items():
            *parents, leaf = dotted.split("__")
            section = config
            for parent in parents:
                section = section.setdefault(parent, {})
            section[leaf] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write
