"""tools/predict.py: what it refuses before a model is loaded. (What it writes: tests/infer, tests/integration.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "predict.py"


def predict(*arguments: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_bad_files_end_in_one_line(tmp_path):
    config = "demo/predict_internlm_demo_mmlu"
    code, err = predict("--config_path", config, "--input_file", tmp_path / "none.json")
    assert code == 2 and "none.json: no such file" in err
    rows = tmp_path / "rows.json"
    rows.write_text('["fine", {"question": "x"}]')
    arguments = ["--config_path", config, "--input_file", rows, "--output_file", tmp_path / "out.npy"]
    code, err = predict(*arguments, "--load_checkpoint", tmp_path)
    assert code == 2 and "rows.json: item 1: " in err and "Traceback" not in err
    assert not (tmp_path / "out.npy").exists()
    code, err = predict(*arguments, "--epoch", "3")
    assert code == 2 and "epoch" in err
