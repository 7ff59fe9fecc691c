"""The planner's memory against that of real runs on this CPU: within 10 %, by size, family, tuning and layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_core import kernels
from llm_core.config import load_config
from llm_core.data.records import RecordWriter
from llm_core.plan import estimate
from llm_core.plan.memory import MIB

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model.model_config."
SIZES = {
    "llama": ("pretrain_llama_demo", {}),
    "llama of 15.7M": (
        "pretrain_llama_demo",
        {
            f"{MODEL}hidden_size": 384, f"{MODEL}num_layers": 6, f"{MODEL}num_heads": 6, f"{MODEL}n_kv_heads": 6,
            f"{MODEL}intermediate_size": 1024, f"{MODEL}vocab_size": 8192, "runner_config.batch_size": 4,
        },
    ),
    "falcon, 16 rows": ("pretrain_falcon_demo", {"runner_config.batch_size": 16}),
    "internlm, accumulated": (
        "pretrain_internlm_demo", {"runner_config.batch_size": 2, "runner_config.gradient_accumulation_steps": 2}
    ),
    "llama, LoRA": ("lora_llama_demo", {}),
    "llama, prefix tuning": ("prefixtuning_llama_demo", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], list[str]]:
    """settings(overrides) -> those of a short run on random records, as key=value."""
    folder = tmp_path_factory.mktemp("measured")
    path = folder / "random.mindrecord"
    ids = np.random.default_rng(0).integers(3, 4000, (128, 257)).astype(np.int32)
    with RecordWriter(path, columns={"input_ids": 257, "labels": 257}, manifest={}) as writer:
        writer.write_rows({"input_ids": ids, "labels": ids})

    def settings(overrides: dict) -> list[str]:
        every = {
            "output_dir": folder / "output", "train_dataset.data_loader.dataset_dir": path, "do_eval": False,
            "train_dataset.input_columns": "[input_ids, labels]", "runner_config.stop_step": 3, **overrides,
        }  # fmt: skip
        return [f"{key}={value}" for key, value in every.items()]

    return settings


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_predicted_peak_memory(name: str, settings: Callable[[dict], list[str]]):
    try:
        kernels.library()
    except kernels.KernelsUnavailable as reason:
        pytest.skip(f"the planner's figures are those of the kernels: {reason}")
    run_file, overrides = SIZES[name]
    arguments = settings(overrides)
    script = ROOT / "tests" / "plan" / "peak_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), run_file, *arguments], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    measured = seen["peak"] - seen["imported"]
    predicted = estimate(load_config(run_file, [tuple(each.split("=", 1)) for each in arguments])).fullest
    print(f"{name}: measured {measured:.0f} MiB, predicted {predicted.total / MIB:.0f}")
    assert predicted.total / MIB == pytest.approx(measured, rel=0.10)
