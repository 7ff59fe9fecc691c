"""Stands for msrun where a test is about the launcher alone: starts the workers, without a scheduler.

    fake_msrun.py LOG_DIR FIRST_RANK COUNT COMMAND...      its process id is in LOG_DIR/msrun.pid
"""

import os
import subprocess
import sys
from pathlib import Path

folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
workers = []
for rank in range(first, first + count):
    with open(folder / f"worker_{rank}.log", "wb") as log:
        place = {"RANK_ID": str(rank), "MS_ROLE": "MS_WORKER"}
        workers.append(subprocess.Popen(sys.argv[4:], env=os.environ | place, stdout=log, stderr=log))
(folder / "msrun.pid").write_text(str(os.getpid()))
sys.exit(any([worker.wait() for worker in workers]))
