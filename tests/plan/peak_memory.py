"""Run as a program: train by a run file and print the process's memory, in MiB, as JSON.

    python peak_memory.py RUN_FILE [key=value ...]   ->   {"imported": 417, "peak": 799}

imported: resident when MindSpore and all that a training needs are imported, before anything is built. peak: the most
that was ever resident. No graph comes from the cache of compiled ones: then a run needs less.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["RUN_LLM_COMPILE_CACHE"] = "0"


def main(run_file: str, *settings: str) -> None:
    from llm_core import runtime
    from llm_core.config import load_config

    overrides = [tuple(setting.split("=", 1)) for setting in settings]
    loaded = load_config(run_file, overrides)
    runtime.start(loaded.config)
    from llm_core.data import records  # noqa: F401
    from llm_core.models import heads, recompute  # noqa: F401
    from llm_core.parallel import tensor  # noqa: F401
    from llm_core.peft import adapters, apply  # noqa: F401
    from llm_core.train import optim, parallel_step, run, step  # noqa: F401

    imported = _resident()
    assert run.train(loaded) == 0
    print(json.dumps({"imported": round(imported, 1), "peak": round(_resident("VmHWM:"), 1)}))


def _resident(name: str = "VmRSS:") -> float:
    """Of the program alone: getrusage would count what the process that started it had held."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
