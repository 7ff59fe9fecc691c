"""The frame of the benchmarks: the ratio line's form, what a result file holds, what `make bench` ends with."""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common, run  # noqa: E402


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


def test_own_side_of_the_train_step_still_fits_the_package():
    """Two steps of a tiny model, so that a change of the step's interface cannot break the benchmark unseen."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from benchmarks import train_step as b\n"
        "b.LENGTH, b.BATCH = 8, 2\n"
        "b.SHAPE.update(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn=32)\n"
        "step = b.own_step(); print(step(0), step(1))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(3 < float(loss) < 6 for loss in done.stdout.split())  # ln 64 = 4.16
