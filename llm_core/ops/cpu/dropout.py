"""Dropout in one pass, forward and backward."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.ops.cpu.custom import kernel
from llm_core.ops.reference.dropout import place_of


class Dropout(nn.Cell):
    """As the reference's, bit for bit: x fp32 [N, D], key int32 [2] -> fp32 [N, D]. Its gradient needs no x."""

    def __init__(self, rate: float, site: int):
        super().__init__(auto_prefix=False)
        self.place = Tensor(np.array(place_of(rate, site), np.uint32).view(np.int32))
        self.kernel = kernel("dropout", lambda x, key, place: x)

    def construct(self, x: Tensor, key: Tensor) -> Tensor:
        return self.kernel(x, key, self.place)

    def bprop(self, x, key, out, dout):
        return self.kernel(dout, key, self.place), ops.zeros_like(key)
