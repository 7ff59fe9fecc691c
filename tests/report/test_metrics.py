"""metrics.jsonl and what is made of it: torn lines, resume, the plot, TensorBoard."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_core.errors import EnvironmentFault, UserError
from llm_core.report.metrics import MetricsLog, read_metrics
from llm_core.report.plot import column, smooth
from llm_core.report.tensorboard import TensorBoardLog

REPOSITORY = Path(__file__).resolve().parents[2]


def test_lines_are_plain_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(step=1, loss=np.float32(1.5), lr=1e-4, overflow=np.bool_(True), tokens=np.int64(7))
        log.write(step=2, loss=float("nan"), global_norm=np.float32("inf"), eval_loss=None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 1.5, "lr": 1e-4, "overflow": True, "tokens": 7}
    assert json.loads(lines[1]) == {"step": 2, "loss": None, "global_norm": None}


def test_a_line_is_in_the_file_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(step=1, loss=1.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write(step=2)


def test_sigkill_loses_no_line(tmp_path):
    code = (
        "import sys\nfrom llm_core.report.metrics import MetricsLog\nlog = MetricsLog(sys.argv[1])\n"
        "for step in range(1, 10**9):\n    log.write(step=step, loss=1.0)\n    print(step, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    for _ in range(50):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    last = int(rest[-1]) if rest else last
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last


def test_resume_drops_the_torn_line_and_later_steps(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step=step, loss=float(step))
        log.write(step=3, eval_loss=0.5)
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.write(step=4, loss=40.0)
    assert [(line["step"], line.get("loss")) for line in read_metrics(path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (3, None), (4, 40.0)
    ]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_resume_without_a_file_begins_one(tmp_path):
    with MetricsLog(tmp_path, resume_step=7) as log:
        log.write(step=8, loss=1.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 8, "loss": 1.0}]


def test_a_new_run_keeps_the_old_file(tmp_path):
    for run in range(3):
        with MetricsLog(tmp_path) as log:
            log.write(step=1, loss=float(run))
    kept = {name: read_metrics(tmp_path / name)[0]["loss"] for name in sorted(os.listdir(tmp_path))}
    assert kept == {"metrics-1.jsonl": 0.0, "metrics-2.jsonl": 1.0, "metrics.jsonl": 2.0}


def test_a_foreign_file_is_refused_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of a metrics file"):
        MetricsLog(tmp_path, resume_step=5)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="--output_dir"):
        MetricsLog(tmp_path / "file" / "out")


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_plot_shows_training_evaluation_and_rate(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 201):
            log.write(step=step, loss=5.0 - step / 100, lr=1e-4, supervised_tokens=512)
            if step % 50 == 0:
                log.write(step=step, eval_loss=5.2 - step / 100)
        assert log.plot("a run") == tmp_path / "loss.png"
    image = pixels(tmp_path / "loss.png")
    assert image.shape[0] > 400 and image.shape[1] > 600
    for colour in ((0x1F, 0x5F, 0xA8), (0xD1, 0x49, 0x5B), (0x66, 0x66, 0x66)):  # training, evaluation, rate
        near = np.abs(image - np.array(colour) / 255).max(axis=-1) < 0.02
        assert near.sum() > 100, colour
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]


def test_plot_of_one_step_and_of_none(tmp_path):
    with MetricsLog(tmp_path) as log:
        assert log.plot() is None
        log.write(step=1, loss=float("nan"))
        assert log.plot() is None
        log.write(step=2, loss=3.0)
        assert log.plot().stat().st_size > 5000


def test_plot_of_evaluations_alone_and_of_steps_without_tokens(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(step=10, eval_loss=2.0)
        assert log.plot() is not None
        for step in (11, 12, 13):
            log.write(step=step, loss=0.0, lr=0.0, supervised_tokens=0)
        assert log.plot() is not None


def test_a_disk_that_becomes_full_leaves_whole_lines(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)
    log.write(step=1, loss=1.0)
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: whole(descriptor, content[:5]))
    with pytest.raises(EnvironmentFault, match="No space left"):
        log.write(step=2, loss=1.0)
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    log.close()


def test_a_step_run_twice_counts_as_it_last_went():
    lines = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 9.0}, {"step": 1, "loss": 3.0}, {"step": 3, "loss": None}]
    steps, losses = column(lines, "loss")
    assert steps.tolist() == [1.0, 2.0] and losses.tolist() == [3.0, 9.0]


def test_smoothing_does_not_lag():
    ramp = np.arange(50, dtype=np.float64)
    np.testing.assert_allclose(smooth(ramp, 11), ramp)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0, 3.0, 0.0]), 3), [0.0, 1.0, 2.0, 1.0, 0.0])


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path / "summary")
    log.write(step=1, loss=np.float32(2.5), lr=None, note="text", ppl=float("inf"))
    log.write(step=2, loss=2.0)
    log.write(step=3, loss=9.0)
    log.close()
    resumed = TensorBoardLog(tmp_path / "summary", purge_step=3)
    resumed.write(step=3, loss=1.5)
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path / "summary"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.0), (3, 1.5)]


def test_tensorboard_missing_names_the_extra(tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"SummaryMonitor.*pip install run-llm\[tensorboard\]"):
        TensorBoardLog(tmp_path)
