"""Products with weights, and rows of a table, in plain MindSpore operators."""

from __future__ import annotations

from mindspore import Tensor, nn, ops


class LinearProduct(nn.Cell):
    """x weight^T: x fp32 [N, in], weight fp32 [out, in] -> fp32 [N, out].

    bf16: products of bfloat16-rounded numbers with fp32 sums, where the backend has them; this one computes in fp32
    in any case.
    """

    def __init__(self, bf16: bool = False):
        super().__init__(auto_prefix=False)
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight)


class EmbeddingLookup(nn.Cell):
    """Rows of a table of `vocab_size` rows: table fp32 [V, D], ids int32 [N] -> fp32 [N, D]."""

    def __init__(self, vocab_size: int):
        super().__init__(auto_prefix=False)

    def construct(self, table: Tensor, ids: Tensor) -> Tensor:
        return ops.gather(table, ids, 0)
