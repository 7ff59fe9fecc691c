"""Dropout whose every bit is a pure function of (seed, step, micro-batch, place, element).

Nothing is drawn from a generator with a state, so a resumed run drops the same elements as the uninterrupted
one. The function is a 32-bit integer hash of the element's index and two key words; each hash serves two
elements, 16 bits each, so rates are exact to 1 / 65536 and the kept elements are scaled by the exact inverse.
"""

from __future__ import annotations

import hashlib

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


def dropout_key(seed: int, step: int, micro_batch: int = 0) -> np.ndarray:
    """The key of one forward pass, int32 [2]: (hash of seed and step, number of the micro-batch)."""
    digest = hashlib.sha256(f"dropout:{seed}:{step}".encode()).digest()
    return np.array([int.from_bytes(digest[:4], "little", signed=True), micro_batch], np.int32)


def place_of(rate: float, site: int) -> tuple[int, int]:
    """What a place in the model adds to the key, 32 bits, and its rate in 1 / 65536."""
    return site * 0x9E3779B9 & 0xFFFFFFFF, round(rate * 65536)


def _word(value: int) -> Tensor:
    return Tensor(np.array([value & 0xFFFFFFFF], np.uint32))


class DropoutMask(nn.Cell):
    """What to multiply with: fp32 [rows, columns], 0 with probability `rate`, else 1 / (1 - rate).

    `key` int32 [2] is dropout_key's; `site` is the number of this place in the model, so that no two places
    drop alike. The multipliers of the hash are those of the published `triple32` and `lowbias32` functions.
    """

    def __init__(self, rate: float, site: int):
        super().__init__(auto_prefix=False)
        word, self.threshold = place_of(rate, site)
        self.kept = 65536 / (65536 - self.threshold)
        self.site = _word(word)
        self.factors = (_word(0xED5AD4BB), _word(0xAC4C1B51), _word(0x31848BAB))
        self.shifts = (_word(17), _word(11), _word(15), _word(14))
        self.low, self.half = _word(0xFFFF), _word(16)
        self.key_step = _word(0x85EBCA6B)
        self.xor = ops.BitwiseXor()
        self.conjunction = ops.BitwiseAnd()

    def _shift(self, x: Tensor, bits: Tensor) -> Tensor:
        return ops.bitwise_right_shift(x, bits)

    def _mix(self, x: Tensor, middle_key: Tensor | None) -> Tensor:
        """Hash of every uint32 of x: three rounds of xor-shift and multiply, a second key coming in half-way."""
        x = self.xor(x, self._shift(x, self.shifts[0])) * self.factors[0]
        x = self.xor(x, self._shift(x, self.shifts[1])) * self.factors[1]
        if middle_key is not None:
            x = self.xor(x, middle_key)
        x = self.xor(x, self._shift(x, self.shifts[2])) * self.factors[2]
        return self.xor(x, self._shift(x, self.shifts[3]))

    def construct(self, key: Tensor, rows: int, columns: int) -> Tensor:
        count = rows * columns
        words = ops.cast(key, ms.uint32)
        first = self._mix(self._mix(words[0:1] + self.site, None) + words[1:2], None)
        second = self._mix(first + self.key_step, None)
        index = ops.cast(ops.arange((count + 1) // 2), ms.uint32)
        bits = self._mix(self.xor(index, first), second)
        bits = ops.concat((self.conjunction(bits, self.low), self._shift(bits, self.half)))
        keep = ops.cast(ops.cast(bits, ms.int32) >= self.threshold, ms.float32) * self.kept
        return keep[:count].reshape(rows, columns)


class Dropout(nn.Cell):
    """x fp32 [N, D] with elements dropped at `rate`, the rest scaled by 1 / (1 - rate); keyed as DropoutMask."""

    def __init__(self, rate: float, site: int):
        super().__init__(auto_prefix=False)
        self.mask = DropoutMask(rate, site)

    def construct(self, x: Tensor, key: Tensor) -> Tensor:
        return x * self.mask(key, x.shape[0], x.shape[1])
