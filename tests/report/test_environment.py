"""The record of a run: what it was and what it ran on."""

import json
import os
import sys

import pytest

from llm_core.errors import EnvironmentFault
from llm_core.report.environment import environment_report, git_state, package_versions, save_run_record


def test_report_holds_what_matters_and_no_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    report = environment_report()
    assert report["variables"]["OMP_NUM_THREADS"] == "3"
    assert "hunter2" not in json.dumps(report)
    assert report["packages"]["mindspore"] and report["cpu"]["usable_cores"] >= 1 and report["memory_gib"] > 0


def test_versions_of_what_is_missing():
    assert package_versions(["no-such-package", "numpy"])["no-such-package"] is None


def test_report_does_not_import_mindspore(tmp_path):
    import subprocess

    code = ("import sys; from llm_core.report.environment import environment_report as e; e(); "
            "print('mindspore' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout == "False\n"


def test_git_state_outside_a_checkout(tmp_path):
    assert git_state(tmp_path) is None


def test_a_resumed_run_adds_to_the_record(tmp_path):
    save_run_record(tmp_path, ["run_llm.py", "--config", "a b.yaml"], "seed: 1\n")
    folder = save_run_record(tmp_path, ["run_llm.py", "--resume_training", "True"], "seed: 2\n")
    assert folder == tmp_path / "run"
    assert sorted(os.listdir(folder)) == ["command-2.txt", "command.txt", "config-2.yaml", "config.yaml",
                                          "environment-2.json", "environment.json"]
    assert (folder / "command.txt").read_text().splitlines()[1] == "run_llm.py --config 'a b.yaml'"
    assert (folder / "config.yaml").read_text() == "seed: 1\n"
    assert (folder / "config-2.yaml").read_text() == "seed: 2\n"
    assert json.loads((folder / "environment-2.json").read_text())["python"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="--output_dir"):
        save_run_record(tmp_path, ["x"], "")
