"""The console: which stream a line takes, bars on a terminal, plain lines elsewhere, colours, log files."""

import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_core.errors import EnvironmentFault
from llm_core.report.console import Console, PlainProgress, has_colour, paint

REPOSITORY = Path(__file__).resolve().parents[2]

SPEAK = """
import sys
from llm_core.report.console import console
console.configure(int(sys.argv[1]))
for i in console.progress(range(20), desc="loop", unit="batch"):
    if i == 10:
        console.log("a log line")
        console.info("a note")
        console.detail("a detail")
console.warn("a warning")
console.error("an error")
console.result("a result")
"""


def speak(verbosity: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-c", SPEAK, str(verbosity)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    return done.stdout, done.stderr


def speak_on_terminal(**environment: str) -> str:
    """Everything the program writes to a pseudo terminal that is its stdout and stderr."""
    master, slave = pty.openpty()
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAK, "0"],
        stdout=slave,
        stderr=slave,
        cwd=REPOSITORY,
        env=variables | {"TERM": "xterm"} | environment,
    )
    os.close(slave)
    seen = b""
    try:
        while piece := os.read(master, 4096):
            seen += piece
    except OSError:  # Linux: the other end has gone
        pass
    os.close(master)
    assert process.wait() == 0
    return seen.decode()


def test_streams_without_a_terminal():
    out, err = speak()
    assert out.splitlines() == ["a log line", "a result"]
    lines = err.splitlines()
    assert lines[0] == "a note"
    assert re.fullmatch(r"loop: 20/20 \(100%\) batch, \d+ s, \S+ batch/s", lines[1])
    assert lines[2:] == ["warning: a warning", "error: an error"]
    assert "\r" not in err and "\033" not in out + err


def test_quiet_leaves_results_and_warnings():
    out, err = speak(-1)
    assert out.splitlines() == ["a result"]
    assert err.splitlines() == ["warning: a warning", "error: an error"]


def test_verbose_adds_details():
    assert "a detail" in speak(1)[1].splitlines()


def test_terminal_shows_a_bar_and_whole_lines():
    seen = speak_on_terminal()
    assert "20/20" in seen and "\r" in seen
    assert "\033[33mwarning:\033[0m a warning" in seen
    # a line printed while the bar stands has its own line, free of the bar's remains
    rows = [row.strip() for row in re.split(r"[\r\n]", seen)]
    assert "a log line" in rows and "a note" in rows


def test_no_color_keeps_the_bar_without_colours():
    seen = speak_on_terminal(NO_COLOR="1")
    assert "20/20" in seen and "\033[3" not in seen
    assert "warning: a warning" in seen


def test_dumb_terminal_gets_plain_lines():
    seen = speak_on_terminal(TERM="dumb")
    assert re.search(r"loop: 20/20 \(100%\) batch", seen)
    assert "\033" not in seen and "\r" not in seen.replace("\r\n", "\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_paint_only_where_colours_show(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert paint("x", "red", Terminal()) == "\033[31mx\033[0m"
    assert paint("x", "red", io.StringIO()) == "x"
    monkeypatch.setenv("NO_COLOR", "")  # the convention: empty means unset
    assert has_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Terminal())


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run_plain(monkeypatch, capsys, total, steps, seconds_per_step):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    with PlainProgress(Console(), None, total, "work", "step", 0) as progress:
        for _ in range(steps):
            clock.now += seconds_per_step
            progress.update()
    return capsys.readouterr().err.splitlines()


def test_plain_progress_says_a_line_every_tenth(monkeypatch, capsys):
    lines = run_plain(monkeypatch, capsys, total=1000, steps=1000, seconds_per_step=1.0)
    assert len(lines) == 10
    assert lines[0].startswith("work: 100/1000 (10%) step, 100 s, 1 step/s")
    assert lines[-1].startswith("work: 1000/1000 (100%)")


def test_plain_progress_of_a_quick_loop_is_one_line(monkeypatch, capsys):
    assert len(run_plain(monkeypatch, capsys, total=1000, steps=1000, seconds_per_step=0.001)) == 1


def test_plain_progress_of_unknown_length_speaks_by_time(monkeypatch, capsys):
    lines = run_plain(monkeypatch, capsys, total=None, steps=95, seconds_per_step=1.0)
    assert [line.split(" step,")[0] for line in lines] == ["work: 30", "work: 60", "work: 90", "work: 95"]


def test_plain_progress_counts_what_was_done_before(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    progress = PlainProgress(Console(), None, 100, "", "step", 80)
    clock.now = 10.0
    progress.set_postfix_str("loss 1.5")
    progress.update(20)
    progress.close()
    assert capsys.readouterr().err == "100/100 (100%) step, 10 s, 2 step/s, loss 1.5\n"


def test_quiet_has_no_progress(capsys):
    quiet = Console()
    quiet.configure(-1)
    assert list(quiet.progress(range(5))) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_log_files_take_every_line_even_when_quiet(tmp_path, capsys):
    quiet = Console()
    quiet.configure(-1)
    quiet.log_to(tmp_path, rank=1)
    quiet.log("{ Epoch:[  1/  1]")
    quiet.warn("odd")
    quiet.error("broken")
    quiet.close_logs()
    quiet.error("later")
    info = (tmp_path / "log/rank_1/info.log").read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(stamp + r" - llm_core - INFO - \{ Epoch:\[  1/  1\]", info[0])
    assert [line.split(" - ", 2)[2] for line in info[1:]] == ["WARNING - odd", "ERROR - broken"]
    assert (tmp_path / "log/rank_1/error.log").read_text().endswith("ERROR - broken\n")


def test_log_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "log").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="rank_0.*--output_dir"):
        Console().log_to(tmp_path)


def test_text_that_the_terminal_cannot_show_is_no_failure():
    code = "from llm_core.report.console import console; console.result('caf\\u00e9 \\u2588')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY, check=True, env=environment
    )
    assert done.stdout == b"caf? ?\n"


def test_import_is_light():
    code = "import sys, llm_core.report.console; print({'tqdm', 'numpy', 'mindspore'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "set()\n"
