"""What the launcher's tests run on each rank: steps that end in a real AllReduce, and a fault on demand.

    worker_script.py FOLDER STEPS [ARGUMENTS ...]      each rank writes FOLDER/rank_R.json with what it was given

A stop signal is agreed upon, as by a training run: all ranks save after the same step and end with its code. Faults,
as lines of FOLDER/faults: `exit RANK CODE` ends that rank before it joins, once; `late RANK` never lets it join.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from llm_core.signals import StopSignals

rank = int(os.environ["RANK_ID"])
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
given = {"arguments": sys.argv[3:], "local": os.environ["LOCAL_WORLD_SIZE"], "pid": os.getpid()}


def write(name: str, content: object) -> None:
    (folder / f"new_{rank}").write_text(json.dumps(content))
    (folder / f"new_{rank}").rename(folder / name)


def faults(kind: str) -> list[list[str]]:
    path = folder / "faults"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [words[1:] for words in lines if words[0] == kind and int(words[1]) == rank]


def work() -> int:
    with StopSignals(signal.SIGTERM, signal.SIGINT) as stop:
        import mindspore as ms
        from mindspore import Tensor, nn, ops
        from mindspore.communication import get_group_size, init

        class Sum(nn.Cell):
            def __init__(self):
                super().__init__()
                self.reduce = ops.AllReduce()

            def construct(self, values):
                return self.reduce(values)

        ms.set_context(mode=ms.GRAPH_MODE)
        ms.set_device("CPU")
        while faults("late"):
            print("I am late", flush=True)
            time.sleep(600)
        init()
        total = Sum()
        for step in range(steps):
            number = int(stop.received or 0) if stop() else 0
            values = total(Tensor([1.0, float(number), float(number > 0)])).asnumpy()
            assert values[0] == get_group_size()
            write(f"rank_{rank}.json", {**given, "step": step})
            print(f"step {step}", flush=True)
            if values[2]:  # so many ranks have got it by now
                write(f"saved_{rank}.json", step)
                return 128 + int(values[1] / values[2])
            time.sleep(0.2)
    return 0


for _, code in faults("exit"):
    (folder / "faults").unlink()
    print("ValueError: the fault that was asked for", flush=True)
    sys.exit(int(code))
sys.exit(work())
