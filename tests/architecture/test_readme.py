"""The README's commands cannot rot: those that take a run file are loaded, flags of tools are looked up in their
help, targets in the Makefile; the few others are listed here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from llm_core import cli

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import table  # noqa: E402

READMES = ("README.md", "README_zh.md")
ELSEWHERE = {"source .venv/bin/activate"}  # what no test of ours can check


def bash_blocks(name: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = "".join(bash_blocks("README.md")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


@cache
def help_of(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{script} --help: {done.stderr}"
    return done.stdout


def check_flags(script: str, arguments: list[str]) -> None:
    known = re.findall(r"--?\w+", help_of(script))
    unknown = [word for word in arguments if re.match(r"--?[a-z]", word) and word not in known]
    assert not unknown, f"{script} has no {unknown}"


def check_run_llm(arguments: list[str], monkeypatch, tmp_path) -> None:
    verb = "show-cfg" if arguments[0].startswith("-") else arguments.pop(0)
    if verb in ("show-cfg", "check", "chat"):  # loaded whole, which checks every key, value and layer
        assert cli.main(["show-cfg", *arguments]) == 0
    elif verb == "copy-cfg":
        assert cli.main([verb, arguments[0], str(tmp_path)]) == 0
    elif verb in ("list-cfg", "schema"):
        assert cli.main([verb, *arguments]) == 0
    else:
        assert verb in cli._VERBS


def run_module(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands())
def test_command_of_the_readme(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command)
    while assignment := re.fullmatch(r"(\w+)=(.*)", program):
        monkeypatch.setenv(*assignment.groups())
        program, *arguments = arguments
        run_module(["-m", "kernels", "info"])  # which refuses a wrong value of KERNELS
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
    elif program == "bash":
        subprocess.run(["bash", "-n", arguments[0]], check=True, timeout=60)
        if arguments[0].endswith("launcher.sh"):
            script, *inner = shlex.split(arguments[1])
            assert script == "run_llm.py"
            check_run_llm(inner, monkeypatch, tmp_path)
    elif program == "python" and arguments[0] == "run_llm.py":
        check_run_llm(arguments[1:], monkeypatch, tmp_path)
    elif program == "python" and arguments[0] == "-m":
        run_module(arguments)
    elif program == "python":
        check_flags(*arguments[:1], arguments[1:])
    else:
        assert command in ELSEWHERE


def test_both_languages_have_the_same_commands():
    assert bash_blocks("README.md") == bash_blocks("README_zh.md")


@pytest.mark.parametrize("name", READMES)
def test_links_point_to_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_benchmark_table_is_made_from_results(tmp_path, monkeypatch):
    (tmp_path / "decode.json").write_text(json.dumps({
        "machine": {"cpu": "CPU X"}, "settings": {"threads": 2}, "commit": "0123456789",
        "ratios": [{"name": "decode_b1", "ratio": 1.25, "own": 150.0, "unit": "tokens/s",
                    "peer": "transformers", "peer_value": 120.0}],
    }))  # fmt: skip
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    for name, (titles, _) in table.TEXTS.items():
        old = (ROOT / name).read_text(encoding="utf-8")
        new = table.with_table(old, table.table(titles))
        assert "| decode_b1 | 1.25 | 150 tokens/s | transformers: 120 tokens/s | CPU X, 2 threads, 01234567 |" in new
        assert old.count(table.BEGIN) == old.count(table.END) == 1
        assert new.partition(table.BEGIN)[0] == old.partition(table.BEGIN)[0]
        assert new.partition(table.END)[2] == old.partition(table.END)[2]


def test_a_wrong_variable_is_noticed(monkeypatch, tmp_path):
    with pytest.raises(AssertionError, match="did you mean reference"):
        test_command_of_the_readme("KERNELS=referenc python run_llm.py list-cfg", monkeypatch, tmp_path)


def test_a_wrong_flag_is_noticed():
    with pytest.raises(AssertionError, match="model_fil"):
        check_flags("tools/dataset_preprocess/llama_preprocess.py", ["--model_fil", "x"])
