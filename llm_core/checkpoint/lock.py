"""One run at a time on an output folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_core.checkpoint.staged import environment_faults, make_folder
from llm_core.errors import UserError


@contextmanager
def lock_output_dir(output_dir: str | Path, rank: int = 0) -> Iterator[Path]:
    """Hold `{output_dir}/.run.lock` (one per rank) while the block runs; yields the folder, created if need be.

    The lock is the kernel's (flock): it ends with the process, however that ends. A file system that has none, as some
    of a network, is told of and no reason to stop. Raises UserError when another process holds the lock, naming its id
    and host, and EnvironmentFault when the folder cannot be written.
    """
    folder = make_folder(Path(output_dir))
    path = folder / (".run.lock" if rank == 0 else f".run.rank_{rank}.lock")
    with environment_faults(folder):
        file = open(path, "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another run is writing here ({_holder(path)}); "
                "wait for it, stop it, or give this run its own --output_dir"
            ) from None
        except OSError as error:
            from llm_core.report.console import console

            console.warn(f"{path} cannot be locked ({error.strerror}); see that no other run writes into this folder")
        with environment_faults(path):
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        yield folder


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known"
