"""What msrun starts in place of each process: it runs the real one, and tells the launcher what becomes of it.

msrun says neither how a process ended nor lets the others finish when one of them has; so the launcher listens to
these instead. A connection to it carries the process' id and, at its end, its status; from the launcher come signals
to pass on. If the connection breaks, the launcher is dead, and a rank is stopped as by SIGTERM.

Started by its path, under whatever Python msrun finds, so it needs the standard library alone:
    python worker.py GRACE INTERPRETER WORDS...
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

# The scheduler runs none of the user's code: no run's output folder is touched, no file of it read.
_SCHEDULER = "from mindspore.communication import init; init()"
_LINGER = 20  # seconds that msrun does not hear of a failure: it would kill the others, which is the launcher's to do


def main() -> int:
    grace, *command = sys.argv[1:]
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        if os.environ["RUN_LLM_NODE"] != "0":  # msrun goes by addresses, and two nodes may share one
            return 0
        name, command = "scheduler", [command[0], "-c", _SCHEDULER]
        os.environ["GLOG_v"] = "2"  # it then names the ranks that have come
    else:
        name = os.environ["RANK_ID"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell's `&` leaves SIGINT ignored
        signal.signal(number, signal.SIG_DFL)
    launcher = socket.socket(socket.AF_UNIX)
    launcher.connect("\0run_llm-" + os.environ["RUN_LLM_JOB"])
    child = subprocess.Popen(command)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: child.send_signal(number))
    stopped = threading.Event()
    threading.Thread(target=_obey, args=(launcher, child, stopped, float(grace)), daemon=True).start()
    _tell(launcher, name=name, pid=child.pid)
    status = child.wait()
    _tell(launcher, name=name, status=status)
    if stopped.is_set() or status == 0:
        return 0
    time.sleep(_LINGER)
    return 1


def _tell(launcher: socket.socket, **message: object) -> None:
    try:
        launcher.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # it is dead; _obey sees that too


def _obey(launcher: socket.socket, child: subprocess.Popen, stopped: threading.Event, grace: float) -> None:
    """Pass on the signals that arrive, a byte each; when no more can, stop the process."""
    while True:
        try:
            numbers = launcher.recv(16)
        except OSError:
            numbers = b""
        stopped.set()
        if not numbers:
            break
        for number in numbers:
            child.send_signal(number)
    if os.environ.get("MS_ROLE") != "MS_SCHED":  # which ends when the last rank has
        child.terminate()
    time.sleep(grace)
    child.kill()


if __name__ == "__main__":
    sys.exit(main())
