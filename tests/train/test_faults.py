"""Real processes, real kills: what a user's command does when something is wrong, and what is left afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from llm_core.report.metrics import read_metrics
from llm_core.runtime import cache_dir

ROOT = Path(__file__).resolve().parents[2]


def command(config: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "run_llm.py"), "--config", str(config), *flags]


def run(config: Path, *flags: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(config, *flags), capture_output=True, text=True, timeout=300, **options)


def refused(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def losses(output_dir: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in read_metrics(output_dir / "metrics.jsonl") if "loss" in entry}


def written(output_dir: Path) -> int:
    """When the metrics file last grew, in nanoseconds; 0 before its first line."""
    metrics = output_dir / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() and b"\n" in metrics.read_bytes() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def wait_for_step(output_dir: Path, step: int, process: subprocess.Popen) -> None:
    metrics = output_dir / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step, process)


def test_a_stop_signal_saves_and_the_run_resumes_to_the_same_curve(write_config, tmp_path):
    """Each of the signals in its turn, on one run: it goes on twice, and then comes to its end."""
    whole = write_config(runner_config__epochs=4, output_dir=str(tmp_path / "whole"))
    assert run(whole).returncode == 0
    config = write_config(runner_config__epochs=4).rename(tmp_path / "killed.yaml")
    flags, steps = [], 0
    for number in (signal.SIGTERM, signal.SIGINT):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command(config, *flags), text=True, **pipes) as process:
            wait_for_step(tmp_path / "out", steps + 5, process)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        assert f"{number.name}: stopped after step" in errors and "Traceback" not in errors
        assert steps < max(losses(tmp_path / "out")) < 84
        flags, steps = ["--resume_training", "True"], max(losses(tmp_path / "out"))
    assert run(config, *flags).returncode == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_sigkill_at_random_moments_never_changes_the_curve(write_config, tmp_path):
    """20 kills of a run that saves every step: some while it starts, most within some saves of its first new step."""
    whole = write_config(runner_config__epochs=32, output_dir=str(tmp_path / "whole"))
    assert run(whole).returncode == 0
    expected = losses(tmp_path / "whole")
    config = write_config(runner_config__epochs=32).rename(tmp_path / "killed.yaml")
    moments = random.Random(11)
    for kill in range(20):
        before = written(tmp_path / "out")
        with subprocess.Popen(
            command(config, "--resume_training", "True"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            if kill % 5 != 4:
                wait_for(lambda before=before: written(tmp_path / "out") > before, process)
                time.sleep(moments.uniform(0.0, 0.3))
            else:
                time.sleep(moments.uniform(0.2, 4.0))
            process.kill()
            errors = process.communicate()[1]
        assert "Traceback" not in errors
        assert process.returncode == -signal.SIGKILL, f"kill {kill}: the run was over: {errors}"
    assert run(config, "--resume_training", "True").returncode == 0
    assert losses(tmp_path / "out") == expected


def test_a_damaged_checkpoint_is_not_loaded(write_config, tmp_path):
    config = write_config(runner_config__stop_step=3)
    assert run(config).returncode == 0
    folder = tmp_path / "out/checkpoint/rank_0"
    newest = folder / json.loads((folder / "meta.json").read_text())["last_ckpt_file"]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    os.chmod(newest, 0o644)
    newest.write_bytes(content)
    refused(run(config, "--resume_training", newest.name), 2, newest.name)
    resumed = run(config, "--resume_training", "True", "--runner_config.stop_step", "4")
    assert resumed.returncode == 0
    assert newest.name in resumed.stderr and "step 2" in resumed.stderr  # fell back, and said so
    newest.write_bytes(content[: len(content) // 3])
    refused(run(config, "--run_mode", "finetune", "--load_checkpoint", str(newest)), 2, newest.name)


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(write_config, tmp_path):
    """The file size limit of the process stands for the disk: the kernel refuses the write in the same way."""
    config = write_config(runner_config__stop_step=2)
    assert run(config).returncode == 0
    bigger = write_config(runner_config__stop_step=4).rename(tmp_path / "again.yaml")
    limit = "import resource, sys, os; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
    limit += "os.execv(sys.executable, [sys.executable] + sys.argv[1:])"
    flags = [str(ROOT / "run_llm.py"), "--config", str(bigger), "--resume_training", "True"]
    result = subprocess.run(
        [sys.executable, "-c", limit, *flags], capture_output=True, text=True, timeout=300,
        env={**os.environ, "RUN_LLM_COMPILE_CACHE": "0"},
    )
    refused(result, 1, "tiny_rank_0-1_3")
    after = run(bigger, "--resume_training", "True")
    assert after.returncode == 0
    assert "step 2" in after.stderr
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]


def test_two_runs_on_one_output_dir(write_config, tmp_path):
    config = write_config(runner_config__epochs=50)
    with subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        wait_for_step(tmp_path / "out", 1, first)
        refused(run(config), 2, str(first.pid), str(tmp_path / "out"), "--output_dir")
        first.kill()


def test_an_output_dir_that_cannot_be_written(write_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(run(write_config(output_dir=str(tmp_path / "file" / "out"))), 1, str(tmp_path / "file"))


def wrong_data(tmp_path: Path, width: int, token: int) -> Path:
    from llm_core.data.records import RecordWriter

    path = tmp_path / "wrong.mindrecord"
    rows = np.full((8, width), token, np.int32)
    with RecordWriter(path, columns={"input_ids": width, "labels": width}, manifest={}) as writer:
        writer.write_rows({"input_ids": rows, "labels": rows})
    return path


@pytest.mark.parametrize(
    "width, token, words",
    [(31, 5, ("31", "25", "seq_length")), (25, 96, ("96", "record 0"))],
    ids=["another length", "an id beyond the vocabulary"],
)
def test_data_that_do_not_fit_the_model(write_config, tmp_path, width, token, words):
    path = wrong_data(tmp_path, width, token)
    refused(run(write_config(), "--train_dataset_dir", str(path)), 2, "wrong.mindrecord", *words)


def test_data_without_their_index(write_config, tmp_path):
    path = wrong_data(tmp_path, 25, 5)
    path.with_name(path.name + ".db").unlink()
    refused(run(write_config(), "--train_dataset_dir", str(path)), 2, "wrong.mindrecord.db")


def test_an_empty_data_file(write_config, tmp_path):
    path = tmp_path / "empty.mindrecord"
    path.touch()
    (tmp_path / "empty.mindrecord.db").touch()
    refused(run(write_config(), "--train_dataset_dir", str(path)), 2, "empty.mindrecord")


def test_weights_of_another_shape_or_name(write_config, tmp_path):
    from safetensors.numpy import save_file

    alien = tmp_path / "alien.safetensors"
    save_file({"encoder.weight": np.zeros((2, 2), np.float32)}, alien)
    config = write_config()
    refused(run(config, "--load_checkpoint", str(alien)), 2, "alien.safetensors", "encoder.weight")
    assert run(write_config(runner_config__stop_step=1, output_dir=str(tmp_path / "first"))).returncode == 0
    result = run(config, "--load_checkpoint", str(tmp_path / "first"), "--model.model_config.hidden_size", "64")
    refused(result, 2, "[96, 32]", "[96, 64]")


def test_a_yaml_that_is_a_list_or_says_a_key_twice(tmp_path, write_config):
    listed = tmp_path / "list.yaml"
    listed.write_text(yaml.safe_dump([{"seed": 1}]))
    refused(run(listed), 2, "list.yaml")
    twice = tmp_path / "twice.yaml"
    twice.write_text(write_config().read_text() + "seed: 4\n")
    refused(run(twice), 2, "twice.yaml", "seed")


def test_a_config_cannot_run_code(tmp_path, write_config):
    evil = tmp_path / "evil.yaml"
    evil.write_text(write_config().read_text() + f"env: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    refused(run(evil), 2, "evil.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_second_start_takes_its_graphs_from_the_cache(write_config, tmp_path, accumulation):
    """And computes the same: MindSpore finds the weights of a cached graph by name among the Cell's children."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(cache_dir() / "kernels")  # not to be compiled for it
    environment = {**os.environ, "RUN_LLM_CACHE": str(tmp_path / "cache")}
    curves, graphs = [], []
    for name in ("first", "second"):
        config = write_config(
            runner_config__stop_step=4, runner_config__gradient_accumulation_steps=accumulation, callbacks=[],
            output_dir=str(tmp_path / name), model__model_config__hidden_dropout_rate=0.1,
        )
        assert run(config, env=environment).returncode == 0
        curves.append(losses(tmp_path / name))
        graphs.append(sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*.mindir")))
    assert curves[0] == curves[1]
    assert len(graphs[0]) == (1 if accumulation == 1 else 2), graphs[0]
    assert graphs[0] == graphs[1]  # nothing compiled anew
