"""Products with weights, and rows of a table."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from llm_core.ops.reference import linear as reference


def LinearProduct(bf16: bool = False) -> nn.Cell:
    """x weight^T: x fp32 [N, in], weight fp32 [out, in] -> fp32 [N, out].

    bf16: products of bfloat16-rounded numbers; the results, gradients too, are rounded to bfloat16 as well.
    """
    return _Bf16Product() if bf16 else reference.LinearProduct()


class _Bf16Product(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.cast(self.product(ops.cast(x, ms.bfloat16), ops.cast(weight, ms.bfloat16)), ms.float32)


class EmbeddingLookup(nn.Cell):
    """Rows of a table of `vocab_size` rows: table fp32 [V, D], ids int32 [N] -> fp32 [N, D].

    The gradient is the operator's own, EmbeddingDenseBackward.
    """

    def __init__(self, vocab_size: int):
        super().__init__(auto_prefix=False)

    def construct(self, table: Tensor, ids: Tensor) -> Tensor:
        return ops.embedding(ids, table)
