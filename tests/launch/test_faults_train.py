"""A training run of two ranks under faults: whatever happens, it goes on to the curve of an undisturbed run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from llm_core.data.records import RecordWriter
from llm_core.report.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SEQ_LENGTH, VOCAB = 24, 96
STEPS = 240  # of some 30 ms: none of the kills comes after the end


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two replicas that saves after every step, STEPS of them."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(7)
    rows = (np.arange(SEQ_LENGTH + 1)[None] * 5 + rng.integers(0, 16, (4 * STEPS, 1))) % 17 + 3
    with RecordWriter(folder / "tiny.mindrecord", columns={"input_ids": SEQ_LENGTH + 1}, manifest={}) as writer:
        writer.write_rows({"input_ids": rows.astype(np.int32)})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({
        "seed": 3, "run_mode": "train", "use_parallel": True, "output_dir": "out",
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "tiny"},
        "runner_config": {"epochs": 1, "batch_size": 2},
        "parallel_config": {"data_parallel": 2},
        "optimizer": {"type": "AdamW", "learning_rate": 0.002},
        "train_dataset": {"data_loader": {
            "type": "MindDataset", "dataset_dir": str(folder / "tiny.mindrecord"), "shuffle": True}},
        "callbacks": [{"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 1}],
        "context": {"device_target": "CPU"},
        "model": {"arch": {"type": "LlamaForCausalLM"}, "model_config": {
            "type": "LlamaConfig", "seq_length": SEQ_LENGTH, "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 1,
            "num_heads": 4, "intermediate_size": 48, "pad_token_id": 0}},
    }))  # fmt: skip
    return path


def command(run_file: Path, folder: Path, *flags: str) -> str:
    words = [str(ROOT / "run_llm.py"), "--config", str(run_file), "--output_dir", str(folder / "run"), *flags]
    return shlex.join(words)


def losses(folder: Path) -> dict[int, float]:
    path = folder / "run/metrics.jsonl"
    return {entry["step"]: entry["loss"] for entry in read_metrics(path) if "loss" in entry} if path.exists() else {}


def rank_process(group, rank: int) -> int:
    """The process that trains as this rank."""
    for pid in group.left():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        of_rank = {f"RANK_ID={rank}".encode(), b"MS_ROLE=MS_WORKER"} <= set(environment)
        if of_rank and words[1].endswith(b"run_llm.py"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def undisturbed(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The curve of one process with the same batches."""
    folder = tmp_path_factory.mktemp("one")
    flags = ["--use_parallel", "False", "--batch_size", "4"]
    done = subprocess.run(
        [sys.executable, *shlex.split(command(run_file, folder, *flags))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return losses(folder)


def same(found: dict[int, float], expected: dict[int, float]) -> bool:
    return found.keys() == expected.keys() and np.allclose(
        [found[step] for step in expected], list(expected.values()), rtol=1e-5, atol=0
    )


@pytest.mark.slow
def test_kill_9_while_training_and_while_saving(run_file, undisturbed, launch, port, tmp_path):
    group = launch(
        tmp_path, 0, "--restart", "2", "CMD", "2", port, "logs", "True", "120", command=command(run_file, tmp_path)
    )
    group.wait_for(lambda: len(losses(tmp_path)) >= 3)
    os.kill(rank_process(group, 1), signal.SIGKILL)
    group.wait_for(lambda: len(losses(tmp_path)) >= 10)
    group.wait_for(lambda: any((tmp_path / "run/checkpoint").glob("rank_*/.*")))  # a checkpoint that is not whole yet
    os.kill(rank_process(group, 0), signal.SIGKILL)
    assert group.end(200) == 0, group.errors
    assert "rank 1 was killed by SIGKILL" in group.errors and "rank 0 was killed by SIGKILL" in group.errors
    assert "start 3 of at most 3" in group.errors
    assert same(losses(tmp_path), undisturbed)


@pytest.mark.slow
def test_a_stop_signal_then_a_full_disk_on_one_rank(run_file, undisturbed, launch, port, tmp_path):
    """The limit of a process' file sizes stands for the disk: the kernel refuses the write in the same way."""
    group = launch(tmp_path, 0, "CMD", "2", port, "logs", "True", "120", command=command(run_file, tmp_path))
    group.wait_for(lambda: len(losses(tmp_path)) >= 3)
    group.process.send_signal(signal.SIGTERM)
    assert group.end(50) == 143, group.errors
    reached = len(losses(tmp_path))
    assert 3 <= reached < STEPS

    limited = tmp_path / "limited.py"
    limited.write_text(
        "import os, resource, runpy, sys\n"
        "full = os.environ['RANK_ID'] == '1' and not os.path.exists('freed')\n"
        "if full:\n"
        "    open('freed', 'w').close()\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.argv.pop(0)\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--resume_training", "True"]
    group = launch(
        tmp_path, 0, "--restart", "1", "CMD", "2", port, "logs", "True", "120",
        command=f"{limited} {command(run_file, tmp_path, *flags)}", RUN_LLM_COMPILE_CACHE="0",
    )  # fmt: skip
    assert group.end(200) == 0, group.errors
    # all ranks hear of it, and any of them may be the first to end
    assert "ended with code 1" in group.errors and "no room on the disk" in group.errors
    assert "start 2 of at most 2" in group.errors
    assert same(losses(tmp_path), undisturbed)
