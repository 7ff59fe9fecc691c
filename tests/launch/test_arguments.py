"""The forms of the command line, and what each of them means."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.errors import UserError
from llm_core.launch.arguments import UsageError, devices, parse, run_arguments

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "run_llm.py")


def job(*argv: str, **environment: str):
    return parse(argv, environment)


def test_each_form_gives_what_upstreams_gives():
    assert (job(RUN).ranks, job(RUN).local, job(RUN).port, job(RUN).timeout) == (8, 8, 8118, 7200)
    assert str(job(RUN).log_dir) == "output/msrun_log"
    assert (job(RUN, "4").ranks, job(RUN, "4").address) == (4, "127.0.0.1")
    six = job(RUN, "4", "9000", "logs", "True", "60")
    assert (six.ranks, six.local, six.port, str(six.log_dir), six.timeout) == (4, 4, 9000, "logs", 60)
    nine = job(RUN, "8", "4", "10.0.0.1", "9000", "1", "logs", "False", "60")
    assert (nine.ranks, nine.local, nine.address, nine.node, nine.nodes) == (8, 4, "10.0.0.1", 1, 2)
    assert list(nine.ranks_of(1)) == [4, 5, 6, 7]


def test_join_false_is_said_in_one_line_and_join_true_not():
    assert "JOIN False" in job(RUN, "4", "9000", "logs", "False", "60").notes[0]
    assert job(RUN, "4", "9000", "logs", "True", "60").notes == ()


@pytest.mark.parametrize("text", ["I love \"Beijing\", because", "it's $HOME `id`; a  b", "中文 \\ *"])
def test_a_prompt_stays_what_it_is(text):
    words = job(f"python {RUN} --predict_data {shlex.quote(text)} --use_parallel True", "2").words
    assert words == (RUN, "--predict_data", text, "--use_parallel", "True")


def test_the_interpreter_is_ours_unless_a_path_names_another():
    assert job(f"python3.11 {RUN}").interpreter == sys.executable
    assert job(f"{sys.executable} {RUN}").interpreter == sys.executable
    with pytest.raises(UserError, match="/no/python: no such interpreter"):
        job(f"/no/python {RUN}")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "0 arguments"),
        ([RUN, "4", "9000"], "3 arguments"),
        ([RUN, "four"], "N is 'four'"),
        ([RUN, "0"], "N is '0'"),
        ([RUN, "4", "80", "logs", "True", "60"], "PORT is 80"),
        ([RUN, "4", "9000", "logs", "perhaps", "60"], "JOIN is 'perhaps'"),
        ([RUN, "--restrat", "1"], "--restrat"),
        ([RUN, "--restart", "often"], "'often'"),
    ],
)
def test_any_other_form_is_refused(argv, word):
    with pytest.raises(UsageError, match=word):
        parse(argv, {})


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["no_such.py", "2"], "no_such.py: no such file"),
        ([f"{RUN} --predict_data 'open", "2"], "No closing quotation"),
        (["python", "2"], "give a script"),
        ([RUN, "8", "3", "10.0.0.1", "9000", "0", "logs", "True", "60"], "LOCAL_N 3"),
        ([RUN, "8", "4", "10.0.0.1", "9000", "2", "logs", "True", "60"], "NODE_RANK 2"),
    ],
)
def test_values_that_cannot_be_meant(argv, word):
    with pytest.raises(UserError, match=word):
        parse(argv, {})


def test_the_environment_says_how_many_where_the_command_does_not():
    assert job(RUN, NPROC_PER_NODE="3").ranks == 3
    assert job(RUN, ASCEND_RT_VISIBLE_DEVICES="0,1,2,3").ranks == 4
    assert job(RUN, NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="0,1,2,3").ranks == 2
    assert job(RUN, "2", NPROC_PER_NODE="2").ranks == 2
    with pytest.raises(UserError, match="NPROC_PER_NODE allows 2"):
        job(RUN, "4", NPROC_PER_NODE="2")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "0, 3,-1,5"}, ["0", "3"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,1"}, ["GPU-8932f937", "1"]),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0-2,7"}, ["0", "1", "2", "7"]),
    ],
)
def test_device_lists(environment, expected):
    assert devices(environment) == expected


def test_a_restart_resumes_whatever_the_command_says():
    options = job("--restart", "3", f"{RUN} --config c --resume_training False --load_checkpoint w", "2")
    assert options.restarts == 3
    assert options.resumed().words == (*options.words, "--resume_training", "True")


@pytest.mark.parametrize("flags", ["", "-u", "-u -W ignore", "-Wignore -Bu", "-X dev -OO", "-uX dev"])
def test_which_commands_are_runs(flags):
    def words(text: str) -> tuple[str, ...]:
        return tuple(f"{flags} {text}".split())

    assert run_arguments(words("some/run_llm.py --config c")) == ["--config", "c"]
    assert run_arguments(words("-m llm_core.cli --config c")) == ["--config", "c"]
    assert run_arguments(words("run_llm.py check --config c")) is None
    assert run_arguments(words("other.py --config run_llm.py")) is None
    assert run_arguments(words("-m other run_llm.py --config c")) is None
    assert run_arguments(words("-c run_llm.py --config c")) is None
    assert run_arguments(words("")) is None
    assert run_arguments(job("run-llm --config c").words) == ["--config", "c"]


def test_flags_of_python_are_no_script():
    assert job(f"python -u {RUN} --config c").words == ("-u", RUN, "--config", "c")
    assert run_arguments(("-um", "llm_core.cli", "--config", "c")) == ["--config", "c"]
    assert job("python -um timeit -n 5").words == ("-um", "timeit", "-n", "5")
    with pytest.raises(UserError, match="no_such.py: no such file"):
        job("python -u -W ignore no_such.py")


def launcher(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts/msrun_launcher.sh"), *argv], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def test_the_script_shows_its_usage_with_upstreams_code():
    done = launcher("a", "b", "c")
    assert done.returncode == 1 and "usage: msrun_launcher.sh" in done.stderr and "Traceback" not in done.stderr
    shown = launcher("--help")
    assert shown.returncode == 0 and "LOCAL_N ADDR PORT NODE_RANK" in shown.stdout


def test_the_predict_script_hands_over_every_word_as_it_is():
    script = ROOT / "scripts/run_llm_predict.sh"
    done = subprocess.run(
        ["bash", script, "parallel", "it's \"é\"  $x.yaml", "weights", "2"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHON": sys.executable, "LC_ALL": "C", "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and "it's \"é\"  $x.yaml: no such file" in done.stderr
