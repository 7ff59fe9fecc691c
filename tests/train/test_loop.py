"""Whole training runs of a tiny model, in this process: accumulation, resume, overflow, anomalies."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from llm_core.config import load_config
from llm_core.data.batch import Batch
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.errors import UserError
from llm_core.report.metrics import read_metrics
from llm_core.train.loop import Run, fit
from llm_core.train.run import build, train

VOCAB = 96  # of conftest's model


def run_of(config: Path, *overrides: tuple[str, str]) -> Run:
    return build(load_config(config, overrides))


def losses(output_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(output_dir / "metrics.jsonl") if "loss" in entry]


def weights(run: Run) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in run.snapshot().items()}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def test_a_run_learns_and_leaves_its_files(write_config, tmp_path):
    code = train(load_config(write_config(runner_config__epochs=3)))
    out = tmp_path / "out"
    curve = losses(out)
    assert code == 0
    assert len(curve) == 3 * 21
    assert np.mean(curve[-5:]) < 0.5 * np.mean(curve[:3])
    assert (out / "loss.png").stat().st_size > 5000
    meta = json.loads((out / "checkpoint/rank_0/meta.json").read_text())
    assert (meta["last_epoch"], meta["last_step"]) == (3, 21)
    assert (out / "checkpoint/rank_0/tiny_rank_0-3_21.safetensors").exists()


def test_accumulation_is_one_sum_over_the_window(write_config, tmp_path):
    """16 micro-batches of 1, 4 of 4 and 1 of 16 make the same steps, padded rows and a partial window included."""
    results = []
    for batch_size, accumulation in ((1, 16), (4, 4), (16, 1)):
        config = write_config(
            runner_config__batch_size=batch_size,
            runner_config__gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / f"out{accumulation}"),
            callbacks=[{"type": "MFLossMonitor"}],
        )
        run = run_of(config)
        assert fit(run) == 0
        assert run.cursor.step == 6  # 84 records: five windows of 16 and one of 4
        results.append((losses(tmp_path / f"out{accumulation}"), weights(run)))
    (_, one), *others = results
    for curve, values in others:
        np.testing.assert_allclose(curve, results[0][0], rtol=1e-6)
        for name in one:
            assert relative(values[name], one[name]) < 1e-4, name


def test_gradients_do_not_depend_on_the_split(write_config, tmp_path):
    """The first window's gradient itself (Adam's m is (1 - beta1) of it) within 1e-6."""
    gradients = []
    for batch_size, accumulation in ((1, 16), (4, 4), (16, 1)):
        config = write_config(
            runner_config__batch_size=batch_size,
            runner_config__gradient_accumulation_steps=accumulation,
            runner_config__stop_step=1,
            runner_wrapper__use_clip_grad=False,
            output_dir=str(tmp_path / f"out{accumulation}"),
            callbacks=[],
        )
        run = run_of(config)
        assert fit(run) == 0
        gradients.append({name: value for name, value in weights(run).items() if name.startswith("adam_m.")})
    first, *others = gradients
    for other in others:
        for name, value in first.items():
            assert relative(other[name], value) < 1e-6, name


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resume_is_bit_equal_with_dropout(write_config, tmp_path, accumulation):
    overrides = {
        "runner_config__epochs": 3,
        "runner_config__gradient_accumulation_steps": accumulation,
        "model__model_config__hidden_dropout_rate": 0.1,
        "model__model_config__attention_dropout_rate": 0.1,
    }
    whole = run_of(write_config(**overrides, output_dir=str(tmp_path / "whole")))
    assert fit(whole) == 0
    expected, final = losses(tmp_path / "whole"), weights(whole)
    steps = whole.total_steps
    for stop in (1, steps // 3, steps // 2, steps - 1):  # the first, the end of an epoch, in the middle of one
        config = write_config(**overrides, output_dir=str(tmp_path / f"part{stop}"))
        assert fit(run_of(config, ("runner_config.stop_step", str(stop)))) == 0
        resumed = run_of(config, ("resume_training", "True"))
        assert resumed.cursor.step == stop
        assert fit(resumed) == 0
        assert losses(tmp_path / f"part{stop}") == expected
        for name, value in weights(resumed).items():
            assert np.array_equal(value, final[name]), name


def test_dropout_changes_the_loss_and_follows_the_seed(write_config, tmp_path):
    def first_losses(name: str, rate: float, seed: int) -> list[float]:
        config = write_config(
            model__model_config__hidden_dropout_rate=rate, output_dir=str(tmp_path / name), seed=seed,
            runner_config__stop_step=2, callbacks=[],
        )
        assert fit(run_of(config)) == 0
        return losses(tmp_path / name)

    assert first_losses("a", 0.3, 3) == first_losses("b", 0.3, 3)
    assert first_losses("c", 0.0, 3) != first_losses("d", 0.3, 3)


def test_overflow_skips_the_update_and_halves_the_scale(write_config):
    sense = {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 2.0**126}
    run = run_of(write_config(runner_wrapper__scale_sense=sense, runner_config__stop_step=1, callbacks=[]))
    before = weights(run)
    assert fit(run) == 0
    assert run.cursor.updates == 0
    assert run.loss_scale.value == 2.0**125
    for name, value in weights(run).items():
        assert np.array_equal(value, before[name]), name


def test_the_loss_scale_changes_nothing_else(write_config, tmp_path):
    curves = []
    for scale in (1.0, 1024.0):
        config = write_config(
            runner_wrapper__scale_sense=scale, runner_config__stop_step=5, output_dir=str(tmp_path / str(scale)),
            callbacks=[],
        )
        assert fit(run_of(config)) == 0
        curves.append(losses(tmp_path / str(scale)))
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-6)


def trained_until_noise(write_config, tmp_path, spike: str) -> Run:
    """A run whose data hold one noise record, under a policy for spikes."""
    return run_of(
        write_config(
            runner_config__epochs=4, runner_config__batch_size=1, lr_schedule__learning_rate=0.003,
            anomaly={"spike": spike, "spike_factor": 3.0, "spike_window": 10, "nan": "stop", "max_events": 50},
            callbacks=[{"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 7}],
        )
    )


def steps_with_record(run: Run, record: int) -> list[int]:
    found, step = [], 0
    for epoch in range(run.epochs):
        for batch in run.loader.epoch(epoch):
            step += 1
            if record in batch.record_ids:
                found.append(step)
    return found


def test_a_spike_is_skipped(write_config, tmp_path, capsys):
    run = trained_until_noise(write_config, tmp_path, "skip")
    noisy = steps_with_record(run, 40)
    assert fit(run) == 0
    assert run.anomaly.events >= 1
    assert run.cursor.updates == run.total_steps - run.anomaly.events
    err = capsys.readouterr().err
    assert f"step {noisy[-1]}: loss" in err and "from records 40" in err and "skipped" in err


def test_a_spike_rolls_back_and_is_left_out_then(write_config, tmp_path, capsys):
    run = trained_until_noise(write_config, tmp_path, "rollback")
    noisy = steps_with_record(run, 40)
    assert fit(run) == 0
    assert noisy[-1] in run.cursor.barred
    err = capsys.readouterr().err
    assert "rolled back to step" in err
    assert f"step {noisy[-1]} is left out" in err
    assert [entry["step"] for entry in read_metrics(tmp_path / "out/metrics.jsonl")][-1] == run.total_steps


def test_a_spike_stops_with_clean_weights(write_config, tmp_path, capsys):
    run = trained_until_noise(write_config, tmp_path, "stop")
    assert fit(run) == 1
    assert "from records 40" in capsys.readouterr().err
    resumed = run_of(tmp_path / "run.yaml", ("resume_training", "True"))
    assert resumed.cursor.step == run.cursor.step  # the step before the noise, not applied
    for name, value in weights(run).items():
        assert np.array_equal(value, weights(resumed)[name]), name


def test_nan_stops_before_it_poisons_the_weights(write_config, capsys):
    config = write_config(
        lr_schedule={"type": "ConstantWarmUpLR", "learning_rate": 1e38, "warmup_steps": 0},
        runner_wrapper__use_clip_grad=False,
    )
    run = run_of(config)
    assert fit(run) == 1
    assert "loss nan" in capsys.readouterr().err or run.anomaly.events == 1
    assert not run.metrics.path.read_text().count("NaN")


def test_resuming_another_run_is_refused_and_changes_nothing(write_config, tmp_path):
    assert fit(run_of(write_config(runner_config__stop_step=3))) == 0
    before = losses(tmp_path / "out")
    first = ("resume_training", "tiny_rank_0-1_1.safetensors")
    with pytest.raises(UserError, match="records_per_step was 4, is 2"):
        run_of(write_config(), first, ("runner_config.batch_size", "2"))
    with pytest.raises(UserError, match="of another shape"):
        run_of(write_config(), first, ("model.model_config.intermediate_size", "64"))
    assert losses(tmp_path / "out") == before


def test_a_fine_tuning_goes_on_where_it_was_though_its_base_is_named(write_config, tmp_path):
    """The command of a killed run with --resume_training True added: load_checkpoint still names the base."""
    assert fit(run_of(write_config(runner_config__stop_step=1, output_dir=str(tmp_path / "base")))) == 0
    file = tmp_path / "base/checkpoint/rank_0/tiny_rank_0-1_1.safetensors"
    weights_alone = tmp_path / "weights.safetensors"
    weights_alone.write_bytes(file.read_bytes())
    for name, base in (("file", weights_alone), ("run", tmp_path / "base"), ("its file", file)):
        config = write_config(output_dir=str(tmp_path / name))
        given = ("load_checkpoint", str(base))
        assert fit(run_of(config, given, ("runner_config.stop_step", "3"))) == 0
        resumed = run_of(config, given, ("resume_training", "True"))
        assert (resumed.cursor.step, resumed.newest.parent) == (3, resumed.store.folder)
    fresh = run_of(write_config(output_dir=str(tmp_path / "new")), ("load_checkpoint", str(weights_alone)),
                   ("resume_training", "True"))  # fmt: skip
    assert fresh.cursor.step == 0 and fresh.newest is None
    continued = run_of(write_config(output_dir=str(tmp_path / "newer")), ("load_checkpoint", str(tmp_path / "base")),
                       ("resume_training", "True"))  # fmt: skip
    assert continued.cursor.step == 1 and continued.newest == file


def test_a_new_run_does_not_roll_back_to_an_earlier_ones_checkpoint(write_config, tmp_path, capsys):
    assert fit(run_of(write_config(runner_config__stop_step=2))) == 0
    run = run_of(
        write_config(
            runner_config__stop_step=4,
            anomaly={"spike": "rollback", "spike_factor": 0.01, "spike_window": 2},  # from the second step on
            callbacks=[{"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 100}],
        )
    )
    assert "earlier run's 2" in capsys.readouterr().err
    assert fit(run) == 0
    assert "no checkpoint to roll back to" in capsys.readouterr().err
    assert run.cursor.updates == 1


def test_a_resumed_run_profiles_its_own_first_steps(write_config):
    assert fit(run_of(write_config(runner_config__stop_step=3))) == 0
    config = write_config(profile=True, profile_start_step=1, profile_stop_step=4)
    assert (run_of(config).operators.first, run_of(config).operators.last) == (2, 4)
    resumed = run_of(write_config(profile=True, profile_stop_step=4), ("resume_training", "True"))
    assert (resumed.operators.first, resumed.operators.last) == (5, 7)


def test_a_record_that_cannot_be_used_loses_no_step(write_config, tmp_path):
    rows = np.full((12, 25), 5, np.int32)
    rows[9, 3] = VOCAB  # in the third batch
    path = tmp_path / "bad.mindrecord"
    with RecordWriter(path, columns={"input_ids": 25}, manifest={}) as writer:
        writer.write_rows({"input_ids": rows})
    config = write_config(
        train_dataset={"data_loader": {"dataset_dir": str(path), "shuffle": False}, "input_columns": ["input_ids"]},
        callbacks=[{"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 100}],
    )
    with pytest.raises(UserError, match="record 9"):
        fit(run_of(config))
    assert run_of(config, ("resume_training", "True")).cursor.step == 2


@pytest.mark.parametrize("at, code, saved", [(2, 143, 2), (4, 0, 4)], ids=["in the middle", "in the last step"])
def test_a_stop_signal_always_leaves_a_checkpoint(write_config, at, code, saved):
    config = write_config(
        runner_config__stop_step=4,
        callbacks=[{"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 100}],
    )
    run = run_of(config)
    run.on_step = lambda step, _: signal.raise_signal(signal.SIGTERM) if step == at else None
    assert fit(run) == code
    assert run_of(config, ("resume_training", "True")).cursor.step == saved


def test_sink_mode_prints_every_sink_size_steps_and_changes_no_number(write_config, tmp_path, capsys):
    curves = []
    for sink in (False, True):
        config = write_config(
            runner_config__sink_mode=sink, runner_config__sink_size=3, runner_config__stop_step=7, callbacks=[],
            output_dir=str(tmp_path / str(sink)),
        )  # fmt: skip
        assert fit(run_of(config)) == 0
        curves.append(losses(tmp_path / str(sink)))
    assert curves[0] == curves[1] and len(curves[1]) == 7
    printed = capsys.readouterr().out.split("{ Epoch:[")[1:]
    assert [int(line.split("step:[")[1].split("/")[0]) for line in printed] == [*range(1, 8), 3, 6, 7]


def test_one_command_from_base_weights_through_every_restart(write_config, tmp_path):
    """--load_checkpoint BASE --resume_training True: first from the base, then from the run's own checkpoints."""
    from safetensors.numpy import save_file

    base = run_of(write_config(seed=9, callbacks=[]))
    values = {name: value for name, value in weights(base).items() if not name.startswith("adam_")}
    save_file(values, tmp_path / "base.safetensors")
    config = write_config(load_checkpoint=str(tmp_path / "base.safetensors"), output_dir=str(tmp_path / "tuned"))
    again = ("resume_training", "True")
    first = run_of(config, again, ("runner_config.stop_step", "2"))
    assert first.cursor.step == 0
    for name, value in values.items():
        assert np.array_equal(weights(first)[name], value), name
    assert fit(first) == 0
    second = run_of(config, again)
    assert second.cursor.step == 2
    for name, value in weights(first).items():
        assert np.array_equal(weights(second)[name], value), name


def test_resuming_on_other_records_is_refused(write_config, records, tmp_path):
    assert fit(run_of(write_config(runner_config__stop_step=1))) == 0
    rows = RecordFile(records).read(np.arange(84))
    rows["input_ids"][3, 3] += 1
    with RecordWriter(tmp_path / "other.mindrecord", columns={name: 25 for name in rows}) as writer:
        writer.write_rows(rows)
    other = ("train_dataset.data_loader.dataset_dir", str(tmp_path / "other.mindrecord"))
    with pytest.raises(UserError, match="data was"):
        run_of(write_config(), ("resume_training", "True"), other)


def test_a_window_without_supervised_tokens_changes_nothing_but_decay(write_config):
    run = run_of(write_config(optimizer__weight_decay=0.0, callbacks=[]))
    before = weights(run)
    ids = np.full((4, 25), 5, np.int32)
    batch = Batch(ids, np.full((4, 25), -100, np.int32), np.arange(4))
    from llm_core.data.batch import shift

    result = run.stepper.run([shift(batch, 0)], lr=0.01, scale=1.0, update=1, step=0)
    assert result.loss == 0.0 and result.tokens == 0
    for name, value in weights(run).items():
        assert np.array_equal(value, before[name]), name
