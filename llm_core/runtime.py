"""Start-up of MindSpore: what must be set before its import, and what after."""

from __future__ import annotations

import os


def prepare_environment(threads: int | None = None) -> None:
    """Set the process environment that MindSpore and OpenMP read once, at import.

    `passive` waiting matters: MindSpore's own thread pool and OpenMP regions share the cores, and spinning
    OpenMP threads take them away from MindSpore (a train step is 1.6x slower). Values that the user has set
    are left alone. Must run before the first `import mindspore`; later calls change nothing.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GLOG_v", "3")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
