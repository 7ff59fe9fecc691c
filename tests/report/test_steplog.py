"""The training log's lines, character for character as MindFormers prints them."""

import re

from llm_core.report.steplog import format_bar_line, format_step_line


def line(**changes) -> str:
    fields = dict(epoch=2, epochs=2, step=12, steps_per_epoch=16, loss=3.6191, step_ms=88.9, lr=5.903933e-05,
                  overflow=False, loss_scale=65536.0, global_norm=0.81)
    return format_step_line(**(fields | changes))


def test_reference_line():
    assert line() == (
        "{ Epoch:[  2/  2], step:[   12/   16], loss: 3.619, per_step_time: 88ms, lr: 5.903933e-05, "
        "overflow cond: False, loss_scale: 65536.0, global_norm: [0.81]"
    )


def test_throughput_is_appended_when_known():
    assert line(tflops=12.3456).endswith("global_norm: [0.81], train_throughput_per_npu: 12.346T")


def test_numbers_print_as_upstreams_float32():
    assert "lr: 1e-05, " in line(lr=1e-5)
    assert "lr: 0.0, " in line(lr=0.0)
    assert "lr: 0.0003, " in line(lr=3e-4)
    assert "loss_scale: 1.0, " in line(loss_scale=1)
    assert "loss_scale: 4294967000.0" not in line(loss_scale=2.0**32)  # an exponent beyond seven digits
    assert "loss_scale: 4.294967e+09, " in line(loss_scale=2.0**32)
    assert "loss: 10.375, " in line(loss=10.375)


def test_what_nobody_computed():
    text = line(loss_scale=None, global_norm=None, overflow=True, loss=float("nan"))
    assert "loss:   nan, " in text
    assert text.endswith("overflow cond: True, loss_scale: unavailable, global_norm: None")


def test_a_log_reader_finds_its_fields():
    pattern = r"step:\[\s*(\d+)/\s*(\d+)\], loss:\s*([\d.]+), per_step_time: (\d+)ms, lr: (\S+),"
    assert re.search(pattern, line()).groups() == ("12", "16", "3.619", "88", "5.903933e-05")


def test_bar_lines():
    bar = format_bar_line(done=14, total=16, samples_per_second=45.4545454, seconds_left=9000.9)
    assert bar == "  87.5% |" + "█" * 43 + " " * 7 + "| 45.45455 samples/s/p  2:30:00 }"
    bar = format_bar_line(done=1, total=1000, samples_per_second=5.06042, seconds_left=124515)
    assert bar == "   0.1% |" + " " * 50 + "| 5.06042 samples/s/p  1 day, 10:35:15 }"
    bar = format_bar_line(done=16, total=16, samples_per_second=1.0, seconds_left=0)
    assert bar == "  100.0% |" + "█" * 50 + "| 1.00000 samples/s/p  0:00:00 }"
