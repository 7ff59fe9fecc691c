"""What every process of a launch does: one run after the other, as the command line would, in the layouts asked for.

    many_runs.py JOBS.json      a list of command lines of run_llm.py; rc of each into JOBS.json.rank_N
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_core.cli import main  # noqa: E402


def run(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
    except Exception:
        traceback.print_exc()
        return 99


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    codes = []
    for argv in json.loads(jobs.read_text()):
        print("JOB", argv, flush=True)
        codes.append(run(argv))
        rank = os.environ.get("RANK_ID", "0")
        jobs.with_name(f"{jobs.name}.rank_{rank}").write_text(json.dumps(codes))
