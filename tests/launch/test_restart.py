"""Starts after a failure: what each of them is told."""

from __future__ import annotations

import sys

import pytest
import yaml

from llm_core.launch.__main__ import main

pytestmark = pytest.mark.usefixtures("fake_msrun")

# In the place of run_llm.py: both ranks note their words; the first two starts fail, the second one after a save.
_RUN = """
import os, pathlib, sys, time
here = pathlib.Path(__file__).parent
words = here / f"words_{os.environ['RANK_ID']}"
with open(words, "a") as file:
    file.write(" ".join(sys.argv[3:]) + "\\n")
start = len(words.read_text().splitlines())
if start == 2 and os.environ["RANK_ID"] == "0":
    (here / "new").write_text("{}")
    (here / "new").rename(here / "out/checkpoint/rank_0/meta.json")
print("step", start, flush=True)
time.sleep(1)
sys.exit(7 if start < 3 else 0)
"""


@pytest.fixture
def command(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("MS_WORKER_NUM", "")  # which the checks set
    (tmp_path / "run_llm.py").write_text(_RUN)
    (tmp_path / "out/checkpoint/rank_0").mkdir(parents=True)
    (tmp_path / "out/checkpoint/rank_0/meta.json").write_text("{}")  # an earlier run's
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "run_mode": "train", "use_parallel": True, "context": {"device_target": "CPU"},
        "parallel_config": {"data_parallel": 2},
        "optimizer": {"type": "AdamW", "learning_rate": 0.001},
        "train_dataset": {"data_loader": {"type": "MindDataset", "dataset_dir": "some.mindrecord"}},
        "model": {"arch": {"type": "LlamaForCausalLM"}, "model_config": {"type": "LlamaConfig"}},
    }))  # fmt: skip
    return f"python -u {tmp_path}/run_llm.py --config {tmp_path}/run.yaml --output_dir {tmp_path}/out"


def test_a_start_goes_on_from_what_this_launch_has_saved_and_not_from_an_earlier_run(command, tmp_path, port, capfd):
    named = "--resume_training chosen.safetensors"
    argv = ["--restart", "2", f"{command} {named}", "2", port, str(tmp_path / "logs"), "True", "60"]
    assert main(argv) == 0
    given = f"--output_dir {tmp_path}/out {named}"
    for rank in range(2):
        words = (tmp_path / f"words_{rank}").read_text().splitlines()
        assert words == [given, given, f"{given} --resume_training True"]
    errors = capfd.readouterr().err
    assert "ended with code 7" in errors and "the last lines of" in errors
    second, third = errors.split("launcher: start 2 of at most 3\n")[1].split("launcher: start 3 of at most 3\n")
    assert "going on from" not in second and third.startswith("launcher: going on from the last whole checkpoint\n")
    assert (tmp_path / "logs/before/worker_1.log").exists()


def test_a_script_of_somebody_else_is_started_again_as_it_is(tmp_path, port, capfd):
    script = tmp_path / "mine.py"
    script.write_text("import sys, pathlib; assert not sys.argv[1:]; pathlib.Path(__file__ + 'x').mkdir(); sys.exit(3)")
    argv = ["--restart", "1", f"{sys.executable} {script}", "1", port, str(tmp_path / "logs"), "True", "60"]
    assert main(argv) == 1  # the folder is there at the second start
    errors = capfd.readouterr().err
    assert "FileExistsError" in errors and "going on from" not in errors


def test_a_start_that_succeeds_is_the_last(tmp_path, port, capfd):
    script = tmp_path / "mine.py"
    script.write_text("import os; print('rank', os.environ['RANK_ID'])")
    assert main(["--restart", "5", str(script), "2", port, str(tmp_path / "logs"), "True", "60"]) == 0
    shown = capfd.readouterr()
    assert shown.out == "rank 0\n" and "start 2" not in shown.err
    assert (tmp_path / "logs/worker_1.log").read_text() == "rank 1\n"
