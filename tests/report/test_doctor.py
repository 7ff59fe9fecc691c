"""The doctor's verdicts, on this machine and on broken ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.report import doctor
from llm_core.report.doctor import FAIL, OK, WARN

REPOSITORY = Path(__file__).resolve().parents[2]


def test_this_machine_is_in_order(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for row in ("mindspore starts", "graph mode", "mindrecord", "operators", "disk, here", "memory", "threads"):
        assert row in out
    assert "FAIL" not in out and "\033" not in out


@pytest.mark.parametrize(
    ("version", "mark"),
    [("2.9.0", OK), ("2.10.0rc1", OK), ("2.8.0", FAIL), ("2.11.0", FAIL), ("3.0", FAIL), (None, FAIL)],
)
def test_version_ranges(version, mark):
    finding = doctor._required("mindspore", version, "2.9", "2.11")
    assert finding.mark == mark
    assert ("pip install 'mindspore>=2.9,<2.11'" in finding.advice) == (mark == FAIL)


def test_too_many_threads_and_spinning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert [finding.mark for finding in doctor.check_threads()] == [WARN, WARN]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert [finding.mark for finding in doctor.check_threads()] == [OK]


def test_no_compiler_is_only_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.check_compiler()[0].mark == WARN


def test_a_crashing_self_test_is_told_with_what_it_had_found(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho '{\"check\": \"mindspore starts\", \"ok\": true, \"found\": \"9\", \"seconds\": 1.0}'\n"
        "echo 'libfoo.so: cannot open' >&2\nkill -ILL $$\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    first, last = doctor.check_selftest()
    assert (first.mark, first.name) == (OK, "mindspore starts")
    assert last.mark == FAIL and "code -4" in last.found and "libfoo.so" in last.found and last.advice


def test_a_hanging_self_test_is_ended(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(doctor, "SELFTEST_SECONDS", 0.5)
    assert "no answer within 0.5 s" in doctor.check_selftest()[-1].found


def test_any_failure_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_python", lambda: [doctor.Finding(FAIL, "python", "2.7", "use 3.11")])
    monkeypatch.setattr(doctor, "check_selftest", list)
    assert doctor.main([]) == 1
    assert "-> use 3.11" in capsys.readouterr().out


def test_named_tokenizers_are_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("RUN_LLM_TOKENIZERS", str(tmp_path))
    (tmp_path / "llama2").mkdir()
    (tmp_path / "llama2" / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "tiny.model").write_bytes(b"x")
    assert doctor.check_tokenizers()[0].found == f"{tmp_path}: llama2, tiny"


def test_self_test_names_what_fails(monkeypatch):
    code = (
        "from llm_core import selftest\n"
        "def broken():\n    raise RuntimeError('no such device')\n"
        "selftest.CHECKS = {'device': broken}\nselftest.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True,
                          env=dict(os.environ))
    assert '"ok": false, "found": "RuntimeError: no such device"' in done.stdout
