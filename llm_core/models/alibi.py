"""ALiBi: attention with linear biases (arXiv 2108.12409), with the numbers that Falcon's checkpoints were trained on.

Softmax does not see what is added to all keys of a query, so a bias that grows with the key's position does what one
that falls with the distance does, and needs no query: fp32 [N, heads, keys].
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


def alibi_slopes(heads: int) -> np.ndarray:
    """Bias per position of every head, fp32 [heads]: 2^(-8 i / n), i = 1..n.

    n is the largest power of two that is not above `heads`; the heads beyond it take every second slope of 2 n.
    """
    n = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    more = [2.0 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return np.array(first + more, np.float32)


class AlibiBias(nn.Cell):
    """Positions of the keys int32 [N, K] -> the bias fp32 [N, heads, K] of AttentionMask and CacheMask.

    Slopes, positions and products are rounded to bfloat16, as in training and in HF: beyond position 256 several
    positions share a value. heads: of the whole model; own: those that the bias is for.
    """

    def __init__(self, heads: int, own: slice = slice(None)):
        super().__init__(auto_prefix=False)
        self.slopes = Tensor(np.ascontiguousarray(alibi_slopes(heads)[own]).reshape(1, -1, 1))

    def construct(self, positions: Tensor) -> Tensor:
        exact = ops.cast(ops.expand_dims(positions, 1), ms.float32)
        return self._round(self._round(self.slopes) * self._round(exact))

    def _round(self, x: Tensor) -> Tensor:
        return ops.cast(ops.cast(x, ms.bfloat16), ms.float32)
