"""`python -m llm_core.selftest`: try on this machine, for real, what every run needs; one JSON line a finding.

A process of its own, started by `run_llm.py doctor`: a MindSpore that dies at an instruction this CPU lacks takes
only this process with it, and the lines printed before tell how far it got.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from llm_core.runtime import prepare_environment


def main() -> None:
    """Run the checks in order, printing {"check", "ok", "found", "seconds"} as each is done."""
    prepare_environment()
    for name, check in CHECKS.items():
        begin = time.perf_counter()
        try:
            found, ok = check(), True
        except Exception as error:  # whatever it is, the doctor shall say it
            found, ok = f"{type(error).__name__}: {error}".splitlines()[0], False
        line = {"check": name, "ok": ok, "found": found, "seconds": time.perf_counter() - begin}
        print(json.dumps(line), flush=True)


def _import_mindspore() -> str:
    import mindspore

    return mindspore.__version__


def _multiply_in_graph_mode() -> str:
    import mindspore as ms
    import numpy as np
    from mindspore import ops

    class Product(ms.nn.Cell):
        def construct(self, a: ms.Tensor, b: ms.Tensor) -> ms.Tensor:
            return ops.matmul(a, b)

    ms.set_context(mode=ms.GRAPH_MODE)
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[5, 6], [7, 8]], np.float32)
    product = Product()(ms.Tensor(a), ms.Tensor(b)).asnumpy()
    if not np.array_equal(product, a @ b):
        raise ArithmeticError(f"2x2 product is {product.tolist()}, not {(a @ b).tolist()}")
    return "a 2x2 product compiled, ran and is right"


def _write_and_read_records() -> str:
    import numpy as np

    from llm_core.data.records import RecordFile, RecordWriter

    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selftest.mindrecord"
        with RecordWriter(path, columns={"input_ids": 4}, manifest={}) as writer:
            writer.write_rows({"input_ids": rows})
        records = RecordFile(path)
        if not np.array_equal(records.read(np.arange(3))["input_ids"], rows):
            raise ValueError("records read differ from records written")
    return "written, read back and equal"


def _kernels() -> str:
    from llm_core import ops

    chosen = ops.backend()
    return f"{chosen.name}: {chosen.reason}"


CHECKS = {
    "mindspore starts": _import_mindspore,
    "graph mode": _multiply_in_graph_mode,
    "mindrecord": _write_and_read_records,
    "operators": _kernels,
}

if __name__ == "__main__":
    main()
