"""Products with weights, and rows of a table."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from llm_core.ops.cpu.custom import bf16_refusal, kernel
from llm_core.ops.reference import linear as reference

FEW_ROWS = 2  # of x, up to which reading the weight is what takes the time


class LinearProduct(nn.Cell):
    """x weight^T: x fp32 [N, in], weight fp32 [out, in] -> fp32 [N, out].

    MindSpore's own product is as fast as any in fp32, but not for the few rows of one generated token. bf16: products
    of bfloat16-rounded numbers, summed in fp32, in the forward pass and in both gradients; few rows are multiplied in
    fp32 all the same, it takes no longer.
    """

    def __init__(self, bf16: bool = False):
        super().__init__(auto_prefix=False)
        self.few = _FewRowsProduct()
        self.many = _Bf16Product() if bf16 and not bf16_refusal() else reference.LinearProduct()

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[0] <= FEW_ROWS and not self.training:
            return self.few(x, weight)
        return self.many(x, weight)


class _FewRowsProduct(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.product = kernel("linear_few", lambda x, w: [x[0], w[0]])
        self.input_gradient = ops.MatMul()
        self.weight_gradient = ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.input_gradient(dout, weight), self.weight_gradient(dout, x)


class _Bf16Product(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.product = kernel("gemm_bf16_nt", lambda x, w: [x[0], w[0]])
        self.input_gradient = kernel("gemm_bf16_nn", lambda dy, w: [dy[0], w[1]])
        self.weight_gradient = kernel("gemm_bf16_tn", lambda dy, x: [dy[1], x[1]])

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight)

    def bprop(self, x, weight, out, dout):
        return self.input_gradient(dout, weight), self.weight_gradient(dout, x)


class EmbeddingLookup(nn.Cell):
    """Rows of a table of `vocab_size` rows: table fp32 [V, D], ids int32 [N] -> fp32 [N, D]."""

    def __init__(self, vocab_size: int):
        super().__init__(auto_prefix=False)
        self.backward = kernel("embedding_backward", lambda ids, dy: [vocab_size, dy[1]], vocab_size=vocab_size)

    def construct(self, table: Tensor, ids: Tensor) -> Tensor:
        return ops.gather(table, ids, 0)

    def bprop(self, table, ids, out, dout):
        return self.backward(ids, dout), ops.zeros_like(ids)
