"""Whole runs with prefix tuning and p-tuning v2: they learn, save the adapter alone, resume, evaluate and predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_core.checkpoint.weights import read_weights
from llm_core.config import load_config
from llm_core.evals.run import evaluate
from llm_core.models.spec import spec_from_config
from llm_core.peft.apply import adapter_shapes
from llm_core.report.metrics import read_metrics
from llm_core.train.check import check
from llm_core.train.loop import fit
from llm_core.train.run import build, train

PREFIX = {"pet_type": "prefixtuning", "prefix_token_num": 6, "mid_dim": 16, "dropout_rate": 0.1}
DIRECT = {"pet_type": "ptuning2", "pre_seq_len": 6, "dropout_prob": 0.0}
STRONG = {"model__model_config__initializer_range": 0.3, "model__model_config__num_layers": 2}
NO_DECAY = {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}


@pytest.fixture
def base(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    """The file of a base with large random weights, which attend to this and that: the first step's rate is 0."""
    config = write_config(output_dir=str(tmp_path / "base"), runner_config__stop_step=1, **STRONG)
    assert train(load_config(config)) == 0
    return tmp_path / "base/checkpoint/rank_0/tiny_rank_0-1_1.safetensors"


@pytest.fixture
def tune(write_config: Callable[..., Path], base: Path) -> Callable[..., Path]:
    """tune(pet_config, **overrides of write_config) -> the path of a run file that tunes `base`."""

    def tune(pet: dict, **overrides: object) -> Path:
        settings = {"load_checkpoint": str(base), "optimizer": NO_DECAY, "model__model_config__pet_config": pet}
        return write_config(**{**settings, **STRONG, "lr_schedule__learning_rate": 0.03, **overrides})

    return tune


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def snapshot(run) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in run.snapshot().items()}


@pytest.mark.parametrize("pet, rate", [(PREFIX, 0.03), (DIRECT, 0.2)], ids=["prefixtuning", "ptuning2"])
def test_a_run_learns_and_saves_the_adapter_alone(tune, base, tmp_path, pet, rate, capsys):
    config = tune(pet, runner_config__epochs=3, lr_schedule__learning_rate=rate)
    before = read_weights(base)
    assert train(load_config(config)) == 0
    curve = losses(tmp_path / "out")
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])
    loaded = load_config(config).config
    shapes = adapter_shapes(spec_from_config(loaded.model), loaded.model.config.pet_config)
    saved = read_weights(tmp_path / "out/checkpoint/rank_0/tiny_rank_0-3_21.safetensors")
    states = {name: value for name, value in saved.items() if name.startswith("adam_")}
    assert {name: value.shape for name, value in saved.items() if name not in states} == shapes
    assert {name.split(".", 1)[1] for name in states} == set(shapes)
    assert all(np.array_equal(value, before[name]) for name, value in read_weights(base).items())
    assert f"{sum(map(np.prod, shapes.values())):,} trainable" in capsys.readouterr().err

    # Evaluation: the adapter beside its base gives what the last steps gave, the base alone does not.
    def measured(name: str, *overrides: tuple[str, str]) -> float:
        data = ("eval_dataset.data_loader.dataset_dir", loaded.train_dataset.data_loader.dataset_dir)
        columns = ("eval_dataset.input_columns", "[input_ids, labels]")
        given = [("run_mode", "eval"), ("output_dir", str(tmp_path / name)), data, columns, *overrides]
        assert evaluate(load_config(config, given)) == 0
        printed = capsys.readouterr().out
        return float(printed.split("'loss': ")[1].split(",")[0])

    tuned = measured("tuned", ("adapter_id", str(tmp_path / "out")))
    alone = measured("alone", ("model.model_config.pet_config", "null"))
    assert tuned < 0.9 * alone
    assert abs(tuned - np.mean(curve[-21:])) < 0.2 * tuned  # those were with dropout
    assert check(load_config(config, [("output_dir", str(tmp_path / "new"))])) == 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resume_is_bit_equal(tune, tmp_path, accumulation):
    overrides = {"runner_config__epochs": 2, "runner_config__gradient_accumulation_steps": accumulation}
    whole = build(load_config(tune(PREFIX, **overrides, output_dir=str(tmp_path / "whole"))))
    assert fit(whole) == 0
    expected, final = losses(tmp_path / "whole"), snapshot(whole)
    stop = whole.total_steps // 3
    config = tune(PREFIX, **overrides, output_dir=str(tmp_path / "part"))
    assert fit(build(load_config(config, [("runner_config.stop_step", str(stop))]))) == 0
    resumed = build(load_config(config, [("resume_training", "True")]))
    assert resumed.cursor.step == stop
    assert fit(resumed) == 0
    assert losses(tmp_path / "part") == expected
    assert all(np.array_equal(value, final[name]) for name, value in snapshot(resumed).items())


def test_micro_batches_and_recomputation_change_nothing(tune, tmp_path):
    few = {"runner_config__stop_step": 4, "callbacks": []}
    ways = {
        "whole": {"runner_config__batch_size": 8},
        "parts": {"runner_config__batch_size": 2, "runner_config__gradient_accumulation_steps": 4},
        "again": {"runner_config__batch_size": 8, "recompute_config": {"recompute": True}},
    }
    results = {}
    for name, settings in ways.items():
        run = build(load_config(tune(DIRECT, **few, **settings, output_dir=str(tmp_path / name))))
        assert fit(run) == 0
        results[name] = snapshot(run)
    for name in ("parts", "again"):
        for parameter, value in results["whole"].items():
            error = np.linalg.norm(results[name][parameter] - value) / max(np.linalg.norm(value), 1e-30)
            assert error < 1e-5, (name, parameter)


def test_predictions_take_the_adapter_by_its_runs_folder(tune, write_config, base, tmp_path, spm_model):
    from llm_core import api

    vocabulary = {"model__model_config__vocab_size": 512}
    assert train(load_config(write_config(**STRONG, **vocabulary, runner_config__stop_step=1))) == 0
    config = tune(PREFIX, **vocabulary, runner_config__stop_step=3, load_checkpoint=str(tmp_path / "out"),
                  output_dir=str(tmp_path / "tuned"))  # fmt: skip
    assert train(load_config(config)) == 0
    given = {
        "run_mode": "predict", "load_checkpoint": str(tmp_path / "out"), "model.model_config.do_sample": False,
        "processor.tokenizer.vocab_file": str(spm_model),
    }  # fmt: skip
    predict = write_config(**STRONG, **vocabulary)  # says nothing of the adapter
    alone = api.load(predict, **given)
    tuned = api.load(predict, **given, adapter_id=str(tmp_path / "tuned"))
    saved = read_weights(tmp_path / "tuned/checkpoint/rank_0/tiny_rank_0-1_3.safetensors")
    table = tuned.completer.generator.net.model.prefix.table
    assert np.array_equal(table.asnumpy(), saved[table.name])
    assert np.abs(tuned.logits("a module") - alone.logits("a module")).max() > 0.1
    assert tuned.generate(["a module", "the"], max_new_tokens=12) != alone.generate(
        ["a module", "the"], max_new_tokens=12
    )
