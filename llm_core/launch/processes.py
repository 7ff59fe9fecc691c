"""Processes of this machine: how they are started, their logs and states, and the end of all with a group's mark."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

from llm_core.launch.arguments import Job


class StopSignals:
    """SIGTERM and SIGINT of the launcher leave a note while this is open: the first, and whether another came after it.

    A lost terminal (SIGHUP) counts as SIGTERM, unless nohup has said that it does not matter. Shells and the kernel
    both report it, as a service manager sends more than one signal: neither is somebody who has lost patience, so
    `again` tells of a SIGTERM or SIGINT that came a second or more after the first.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.again = False
        self._since = 0.0

    def __enter__(self) -> StopSignals:
        self._before = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._since = (signal.SIGTERM if number == signal.SIGHUP else number), now
        elif number != signal.SIGHUP and now - self._since >= 1:
            self.again = True


def msrun_command(job: Job, address: str) -> list[str]:
    """msrun with worker.py in the place of the job's command; address: of node 0, as numbers."""
    python = "python" if (Path(sys.executable).parent / "python").exists() else "python3"  # msrun knows these two names
    return [
        sys.executable, "-m", "mindspore.parallel.cluster.run",
        f"--worker_num={job.ranks}", f"--local_worker_num={job.local}", f"--node_rank={job.node}",
        f"--master_addr={address}", f"--master_port={job.port}", f"--cluster_time_out={job.timeout}",
        f"--log_dir={job.log_dir.absolute()}", "--join=True", "--tail_worker_log=-2",  # no rank: it is done here
        python, str(Path(__file__).with_name("worker.py")), str(job.grace), job.interpreter, *job.words,
    ]  # fmt: skip


def environment_of(job: Job, token: str) -> dict[str, str]:
    """What msrun and all below it find in their environment; the token marks them as this group's."""
    mine = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{mine}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "RUN_LLM_JOB": token,
        "RUN_LLM_NODE": str(job.node),
        "LOCAL_WORLD_SIZE": str(job.local),
        "PYTHONUNBUFFERED": "1",  # a log that ends where a killed process did
    }


def msrun_log(job: Job) -> Path:
    """What this machine's msrun says; machines may share the folder."""
    return job.log_dir / (f"msrun_{job.node}.log" if job.node else "msrun.log")


def set_aside_logs(job: Job) -> None:
    """Move the logs of an earlier start, of this machine's ranks, out of the way: into LOG_DIR/before."""
    names = [msrun_log(job).name, *(f"worker_{rank}.log" for rank in job.ranks_of(job.node))]
    if job.node == 0:
        names += ["scheduler.log"]
        more = sorted(job.log_dir.glob("worker_*.log"))
        names += [path.name for path in more if path.name not in names and _rank(path) >= job.ranks]
    before = job.log_dir / "before"
    for name in names:
        if (job.log_dir / name).exists():
            before.mkdir(exist_ok=True)
            shutil.move(job.log_dir / name, before / name)


def _rank(path: Path) -> int:
    text = path.stem.removeprefix("worker_")
    return int(text) if text.isdecimal() else -1


class Follower:
    """Prints the whole lines that a log has got since the last call."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.open = path, 0, True

    def print_new(self, last: bool = False) -> None:
        """Nothing while the log is not there, or once nobody reads the output any more; `last`: part of a line too."""
        if not self.open or not self.path.exists():
            return
        with open(self.path, "rb") as log:
            log.seek(self.offset)
            data = log.read()
        end = len(data) if last else data.rfind(b"\n") + 1
        self.offset += end
        self.open = write(sys.stdout, data[:end])


def write(stream: TextIO | None, data: bytes) -> bool:
    """Write at once, whatever the terminal's encoding; False if that cannot be, and then for good.

    Nobody reads any more (`| head`), the terminal is gone, the disk behind it is full: no reason to end a group.
    """
    if stream is None:  # closed before we began
        return False
    try:
        stream.buffer.write(data)
        stream.buffer.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def kill_all(token: str) -> list[int]:
    """SIGKILL to every process that carries the group's token in its environment; those that will not die."""
    for _ in range(200):
        found = members(token)
        if not found:
            return []
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        time.sleep(0.05)
    return found


def members(token: str) -> list[int]:
    """Processes that carry the token, whatever session or parent they have got into."""
    mark = f"RUN_LLM_JOB={token}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                environment = Path(f"/proc/{entry}/environ").read_bytes()
            except OSError:
                continue
            if mark in environment.split(b"\0"):
                found.append(int(entry))
    return found


def state_of(pid: int) -> str:
    """The letter that /proc has for a process' state; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""
