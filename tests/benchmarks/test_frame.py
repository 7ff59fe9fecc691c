"""The frame of the benchmarks: the ratio line's form, result files, timing in turn, what `make bench` ends with."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common, run, timing  # noqa: E402


def test_ratio_line_has_the_agreed_form(capsys):
    common.ratio_line("decode_b1", 1.25, 150.0, "tokens/s", "transformers", 120.0)
    assert capsys.readouterr().out == "ratio decode_b1 1.250 (own 150 tokens/s, transformers 120 tokens/s)\n"


def test_result_file_says_how_to_repeat_it(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    ratio = common.Ratio("x", 2.0, 2.0, "s", "peer", 1.0)
    path = common.write_result("x", [{"own": 1}], [ratio], {"batch": 4})
    result = json.loads(path.read_text())
    assert result["settings"] == {"threads": 2, "batch": 4}
    assert result["ratios"][0]["ratio"] == 2.0 and result["repetitions"] == [{"own": 1}]
    assert result["versions"]["mindspore"] and result["machine"]["cores"] >= 1
    assert {"command", "commit", "date"} <= set(result)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_ratio_lines_of_a_script_are_collected(tmp_path):
    script = tmp_path / "bench.py"
    script.write_text("print('noise')\nprint('ratio a 1.000 (own 1 s, p 1 s)')\nraise SystemExit(3)\n")
    assert run.run(script) == (3, ["ratio a 1.000 (own 1 s, p 1 s)"])


def test_lists_of_numbers_take_one_line():
    value = {"ms": [1.5, 2e-05, -3], "empty": [], "words": ["a", "b"], "nested": [{"x": [1, 2]}]}
    text = common.compact(json.dumps(value, indent=1))
    assert json.loads(text) == value
    assert '"ms": [ 1.5, 2e-05, -3 ]' in text and '"x": [ 1, 2 ]' in text
    assert '"words": [\n' in text


def test_sides_are_measured_in_turn_and_the_first_round_is_dropped():
    asked = []

    def side(name: str, seconds: float):
        def measure() -> float:
            asked.append(name)
            return seconds

        return measure

    times = timing.in_turn({"own": side("own", 1.0), "peer": side("peer", 2.0)}, budget=0)
    assert asked == ["own", "peer"] * (timing.FEWEST_ROUNDS + 1)
    assert times == {"own": [1.0] * timing.FEWEST_ROUNDS, "peer": [2.0] * timing.FEWEST_ROUNDS}
    assert timing.medians(times) == {"own": 1000, "peer": 2000}
    times = timing.in_turn({"own": side("own", 1.0)}, budget=60)
    assert len(times["own"]) == timing.MOST_ROUNDS


def test_a_short_call_is_timed_many_times_and_a_long_one_once():
    calls = []
    assert 0 < timing.block(lambda: calls.append(1)) < 1e-3 and len(calls) > 100
    calls.clear()
    assert timing.block(lambda: (calls.append(1), time.sleep(0.11))) >= 0.11 and len(calls) == 1
