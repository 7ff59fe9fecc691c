"""SIGKILL at random moments of a process that saves all the time: the last checkpoint is always whole."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_core.checkpoint.store import CheckpointStore

SAVING = """
import sys
import numpy as np
from llm_core.checkpoint.store import CheckpointStore

store = CheckpointStore(sys.argv[1], "llama", keep_max=1, keep_best="eval_loss", file_format=sys.argv[2])
last = store.latest()
step = store.read(last)[3] if last else 0
while True:
    step += 1
    tensors = {"w": np.full((64, 64), step, np.float32), "adam_m.w": np.full((64, 64), -step, np.float32)}
    store.save(1, step, tensors, {"step": step}, metric=1.0 / step)
    store.save(1, step, tensors, {"step": step})  # again under the same name, as on a signal after a save
    print(step, flush=True)
"""


@pytest.mark.parametrize("file_format", ["safetensors", "ckpt"])
def test_a_killed_run_loses_no_finished_save(tmp_path, file_format):
    moments = random.Random(file_format)
    finished = 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(tmp_path), file_format],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        first = process.stdout.readline()
        time.sleep(moments.uniform(0, 0.12))
        process.kill()
        lines = [first, *process.stdout.read().split()]
        process.wait()
        finished = max([finished, *map(int, lines)])
        store = CheckpointStore(tmp_path, "llama", file_format=file_format)
        tensors, state, _, step = store.read(store.latest())
        assert finished <= step <= finished + 1
        assert state == {"step": step}
        np.testing.assert_array_equal(tensors["w"], np.full((64, 64), step))
        np.testing.assert_array_equal(tensors["adam_m.w"], np.full((64, 64), -step))
        assert store.best() is not None
        finished = step
    assert finished >= 10
    store.save(1, step + 1, tensors, {})
    leftovers = [path.name for path in store.folder.iterdir() if path.name.startswith(".")]
    assert leftovers == []
