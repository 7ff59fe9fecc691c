"""llm_core's Attention Cell against naive attention in MindSpore operators. For benchmarks/attention.py."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import common, timing
from benchmarks.attention_sides import relative

HEADS, DIM = 4, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BUDGET = 2.0  # seconds a row
TOLERANCE = 1e-5  # relative


def measure(lengths: list[int]) -> list[dict]:
    """Our Cell and naive attention, forward and with gradients, at every length; runs in a process of its own."""
    from llm_core.runtime import prepare_environment

    prepare_environment(common.THREADS)
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn, ops

    from llm_core import ops as core_ops

    ms.set_context(mode=ms.GRAPH_MODE)
    if core_ops.backend().name != "cpu":
        raise SystemExit(f"attention: no kernels here: {core_ops.backend().reason}")

    class Own(nn.Cell):
        """As the decoder calls it."""

        def __init__(self):
            super().__init__()
            self.mask = core_ops.AttentionMask(HEADS, DIM)
            self.attention = core_ops.Attention(DIM)

        def construct(self, q, k, v, added):
            return self.attention(q, k, v, self.mask(q.shape[0], q.shape[1], k.shape[1]))

    class Naive(nn.Cell):
        """As one writes it: heads outside, scores, mask, softmax, product."""

        def __init__(self):
            super().__init__()
            self.scores, self.product = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
            self.softmax = ops.Softmax(-1)

        def construct(self, q, k, v, added):
            q, k, v = (ops.transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
            scores = self.scores(q, k) * DIM**-0.5 + added
            return ops.transpose(self.product(self.softmax(scores), v), (0, 2, 1, 3))

    class WithGradients(nn.Cell):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell
            self.gradient = ops.GradOperation(get_all=True, sens_param=True)

        def construct(self, q, k, v, added, dout):
            return self.gradient(self.cell)(q, k, v, added, dout)[:3]

    rows = []
    for length in lengths:
        random = np.random.default_rng(0)
        shape = (1, length, HEADS, DIM)
        q, k, v, dout = (Tensor(random.standard_normal(shape, np.float32)) for _ in range(4))
        added = Tensor(np.triu(np.full((length, length), -1e30, np.float32), 1)[None, None])
        for name, wrap, arguments in (("fwd", lambda cell: cell, (q, k, v, added)),
                                      ("fwd+bwd", WithGradients, (q, k, v, added, dout))):  # fmt: skip
            cells = {"own": wrap(Own()), "naive": wrap(Naive())}

            def run(side: str, cells: dict = cells, arguments: tuple = arguments) -> list[Any]:
                found = cells[side](*arguments)
                found = list(found) if isinstance(found, tuple) else [found]
                found[0].asnumpy()  # waits; no more than a copy of one tensor
                return found

            worst = max(relative(a.asnumpy(), b.asnumpy()) for a, b in zip(run("own"), run("naive"), strict=True))
            if worst > TOLERANCE:
                raise SystemExit(f"attention: MindSpore S {length} {name}: own and naive differ by {worst:.1e}")
            times = timing.in_turn({side: lambda s=side, r=run: timing.block(lambda: r(s)) for side in cells}, BUDGET)
            rows.append({"length": length, "pass": name, "ms": timing.medians(times)})
            print(f"  mindspore S {length} {name}: {rows[-1]['ms']}", file=sys.stderr, flush=True)
    return rows


