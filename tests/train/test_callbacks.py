"""What happens between the steps of a run: evaluation, samples, checkpoints, TensorBoard, a profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.config import load_config
from llm_core.errors import UserError
from llm_core.report.metrics import read_metrics
from llm_core.train.run import build, train

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_with_every_callback(write_config, records, tmp_path, capsys, spm_model):
    pytest.importorskip("tensorboard")
    loader = {"type": "MindDataset", "dataset_dir": str(records)}
    config = write_config(
        runner_config__epochs=2,
        do_eval=True,
        eval_step_interval=14,
        eval_epoch_interval=1,
        eval_dataset={"data_loader": loader, "input_columns": ["input_ids", "labels"]},
        profile=True,
        profile_start_step=3,
        profile_stop_step=5,
        model__model_config__vocab_size=512,
        processor={"tokenizer": {"type": "LlamaTokenizer", "vocab_file": str(spm_model)}},
        callbacks=[
            {"type": "MFLossMonitor", "per_print_times": 7},
            {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 10, "keep_checkpoint_max": 1,
             "keep_best": "eval_loss", "save_network_params": True},
            {"type": "SampleMonitor", "prompts": ["Return the"], "sample_steps": 20, "max_new_tokens": 4},
            {"type": "SummaryMonitor"},
        ],
    )  # fmt: skip
    assert train(load_config(config)) == 0
    out = tmp_path / "out"
    printed = capsys.readouterr().out

    assert printed.count("{ Epoch:[") == 6  # 42 steps, every seventh
    entries = read_metrics(out / "metrics.jsonl")
    evaluated = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    assert sorted(evaluated) == [14, 21, 28, 42]
    assert evaluated[42] < evaluated[14]
    assert printed.count("PerplexityMetric = ") == 4
    assert printed.count("sample: 'Return the' -> ") == 2
    assert list((out / "summary").glob("events.*"))

    folder = out / "checkpoint/rank_0"
    best = json.loads((folder / "tiny_rank_0-best.json").read_text())
    assert best["value"] == min(evaluated.values())
    assert (folder / best["file"]).exists()
    assert len(list(folder.glob("*.safetensors"))) <= 2  # the last and the best
    assert list((out / "checkpoint_network/rank_0").glob("*.safetensors"))

    spans = {event["name"] for event in json.loads((out / "profile/timeline.json").read_text())["traceEvents"]}
    assert {"data", "compute", "save", "evaluate", "sample"} <= spans
    assert "MatMul" in printed  # the table of operators


def test_a_sample_prompt_without_room_is_refused_before_the_first_step(write_config, spm_model):
    config = write_config(
        model__model_config__vocab_size=512,
        processor={"tokenizer": {"type": "LlamaTokenizer", "vocab_file": str(spm_model)}},
        callbacks=[{"type": "SampleMonitor", "prompts": ["Return the"], "max_new_tokens": 32}],  # of a context of 24
    )
    with pytest.raises(UserError, match="prompt 'Return the'"):
        build(load_config(config))


def test_the_best_is_looked_for_only_with_evaluations(write_config):
    monitor = {"type": "CheckpointMonitor", "keep_best": "eval_loss"}
    with pytest.raises(UserError, match="keep_best"):
        load_config(write_config(callbacks=[monitor])).require_runnable()


def test_quiet_and_piped_runs_have_no_bar(write_config, tmp_path):
    config = write_config(runner_config__stop_step=3, callbacks=[])
    command = [sys.executable, str(ROOT / "run_llm.py"), "--config", str(config)]
    loud = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert loud.stdout.count("step:[") == 3
    assert "\r" not in loud.stderr and "\x1b" not in loud.stdout + loud.stderr
    quiet = subprocess.run([*command, "-q"], capture_output=True, text=True, timeout=200)
    assert (quiet.stdout, quiet.stderr) == ("", "")
    assert "step:[" in (tmp_path / "out/log/rank_0/info.log").read_text()


def test_recompute_changes_no_number(write_config, tmp_path):
    curves = []
    for recompute in (False, True):
        config = write_config(
            runner_config__stop_step=3, callbacks=[], output_dir=str(tmp_path / str(recompute)),
            recompute_config={"recompute": recompute},
        )
        assert train(load_config(config)) == 0
        curves.append([entry["loss"] for entry in read_metrics(tmp_path / str(recompute) / "metrics.jsonl")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_the_run_record(write_config, tmp_path):
    config = write_config(runner_config__stop_step=1, callbacks=[])
    command = [sys.executable, str(ROOT / "run_llm.py"), "--config", str(config), "--seed", "5"]
    assert subprocess.run(command, capture_output=True, timeout=200, env={**os.environ}).returncode == 0
    record = tmp_path / "out/run"
    assert "--seed 5" in (record / "command.txt").read_text()
    assert json.loads((record / "environment.json").read_text())["packages"]["mindspore"]
    again = load_config(record / "config.yaml").config
    assert again == load_config(config, [("seed", "5")]).config


def test_training_from_python(write_config, tmp_path):
    from llm_core import api

    overrides = {"runner_config.stop_step": 2, "output_dir": str(tmp_path / "api")}
    assert api.train(write_config(callbacks=[]), **overrides) == 0
    assert len(read_metrics(tmp_path / "api/metrics.jsonl")) == 2
