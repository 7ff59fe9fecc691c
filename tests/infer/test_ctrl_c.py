"""Ctrl-C in a real terminal: it ends the answer, and the program goes on."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Without the compile cache an answer takes seconds, so that the keys, a second later, meet it half-way.
COMPILING = {**os.environ, "RUN_LLM_COMPILE_CACHE": "0"}
CTRL_C, CTRL_D = b"\x03", b"\x04"


def in_terminal(arguments, replies, limit=120):
    """Run run_llm.py in a terminal of its own.

    replies: (text to wait for, behind the last one; keys to type a second later, when the program has gone on).
    Returns what the terminal showed, and the exit code.
    """
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, str(ROOT / "run_llm.py"), *map(str, arguments)], COMPILING)
    shown, seen, replies, end = b"", 0, list(replies), time.monotonic() + limit
    while time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # the program has ended
                break
        if replies and (found := shown.find(replies[0][0], seen)) >= 0:
            seen = found + len(replies[0][0])
            time.sleep(1)
            os.write(terminal, replies.pop(0)[1])
    if time.monotonic() >= end:
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert not replies, f"exit {code}; never shown: {replies[0][0]!r} in {shown!r}"
    return shown.decode(errors="replace"), code


def test_predict_keeps_what_was_written(run_file, tmp_path):
    arguments = ["--config", run_file, "--predict_data", "Once: ", "--output_dir", tmp_path]
    arguments += ["--model.model_config.max_new_tokens", 240, "--model.model_config.eos_token_id", 0]
    shown, code = in_terminal(arguments, [(b"Once: ", CTRL_C)])
    assert code == 130, shown
    [line] = (tmp_path / "text_generation_result.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["finish_reason"] == "interrupted"
    assert 0 < json.loads(line)["new_tokens"] < 240


def test_sigterm_keeps_what_was_written(run_file, tmp_path):
    arguments = ["--config", run_file, "--predict_data", "Once: ", "--output_dir", tmp_path]
    arguments += ["--model.model_config.max_new_tokens", 240, "--model.model_config.eos_token_id", 0]
    command = [sys.executable, str(ROOT / "run_llm.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=COMPILING, **pipes) as process:
        while "parameters matched" not in process.stderr.readline():  # the weights are there, compiling begins
            assert process.poll() is None
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    [line] = (tmp_path / "text_generation_result.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["finish_reason"] == "interrupted"


def test_chat_goes_on_after_a_stopped_answer(run_file):
    arguments = ["chat", "--config", run_file, "--processor.chat_template", "none"]
    arguments += ["--model.model_config.max_new_tokens", 240, "--model.model_config.eos_token_id", 0]
    script = [
        (b"> ", b"Hello\n"),
        (b"Hello\r\n", CTRL_C),
        (b"(stopped)", b"/set max_new_tokens 2\n"),
        (b"max_new_tokens 2", CTRL_C),
        (b"Ctrl-D leaves)", CTRL_D),
    ]
    shown, code = in_terminal(arguments, script)
    assert code == 0, shown
    assert "Traceback" not in shown
