"""The planner's memory against that of real runs on this CPU: within 10 %, by size, family, tuning and layout."""

from __future__ import annotations

import json
import os
import shlex
import socket
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
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
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


SCRIPT = ROOT / "tests" / "plan" / "peak_memory.py"


@pytest.fixture(scope="module", autouse=True)
def needs_the_kernels() -> None:
    try:
        kernels.library()
    except kernels.KernelsUnavailable as reason:
        pytest.skip(f"the planner's figures are those of the kernels: {reason}")


def compare(name: str, output: str, run_file: str, arguments: list[str]) -> None:
    """What the run has printed of its memory must be what is planned for it."""
    seen = next(json.loads(line) for line in output.splitlines() if line.startswith('{"imported"'))
    measured = seen["peak"] - seen["imported"]
    predicted = estimate(load_config(run_file, [tuple(each.split("=", 1)) for each in arguments])).fullest
    print(f"{name}: measured {measured:.0f} MiB, predicted {predicted.total / MIB:.0f}")
    assert predicted.total / MIB == pytest.approx(measured, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_predicted_peak_memory(name: str, settings: Callable[[dict], list[str]]):
    run_file, overrides = SIZES[name]
    arguments = settings(overrides)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), run_file, *arguments], capture_output=True, text=True, timeout=600, env=ENV
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compare(name, done.stdout, run_file, arguments)


@pytest.mark.slow
def test_predicted_peak_memory_of_two_ranks(settings: Callable[[dict], list[str]], tmp_path: Path):
    """Data parallel with ZeRO's first stage; rank 0, which also writes what the run leaves behind."""
    layout = {
        "use_parallel": True, "parallel_config.data_parallel": 2, "parallel.zero_stage": 1,
        "callbacks": "[{type: MFLossMonitor}]",
    }  # fmt: skip
    arguments = settings(layout)
    command = shlex.join([str(SCRIPT), "pretrain_llama_demo", *arguments])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "llm_core.launch", command, "2", str(port), str(tmp_path / "logs"), "True", "300"]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=900, env=ENV, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    compare("dp2, ZeRO 1", (tmp_path / "logs" / "worker_0.log").read_text(), "pretrain_llama_demo", arguments)
