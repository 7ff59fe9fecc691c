"""The token loss in plain MindSpore operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from llm_core.ops.reference.linear import LinearProduct


class TokenNll(nn.Cell):
    """Sum of -log softmax(logits)[label] over the supervised tokens, and how many they are.

    logits fp32 [N, V]; labels int32 [N], negative = ignored -> (fp32 [], fp32 []). Ignored rows contribute
    exactly 0 to the loss and to the gradient.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.core = _SoftmaxNll()

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        supervised = ops.cast(labels >= 0, ms.float32)
        loss, _ = self.core(logits, ops.maximum(labels, 0).reshape(-1, 1), supervised.reshape(-1, 1))
        return loss, supervised.sum()


class LinearNll(nn.Cell):
    """TokenNll of the logits x weight^T: x fp32 [N, H], weight fp32 [V, H], labels int32 [N] -> (fp32 [], fp32 []).

    frozen: a promise that nobody asks for the gradient to weight.
    """

    def __init__(self, bf16: bool = False, frozen: bool = False):
        super().__init__(auto_prefix=False)
        self.product = LinearProduct(bf16)
        self.nll = TokenNll()

    def construct(self, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.nll(self.product(x, weight), labels)


class _SoftmaxNll(nn.Cell):
    """Weighted sum of -log softmax(logits)[label]: logits [N, V], labels [N, 1], weights [N, 1] -> [] and softmax.

    log sum exp is taken from the softmax P that the gradient needs anyway: it is x_j - log P_j at the largest
    x_j, where P_j >= 1 / V cannot underflow. Gradient: (P - onehot) * weight.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.softmax = ops.Softmax(-1)
        self.largest = ops.ArgMaxWithValue(axis=-1, keep_dims=True)
        self.pick = ops.GatherD()
        self.product = ops.MatMul()

    def construct(self, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.softmax(logits)
        where, largest = self.largest(logits)
        log_total = largest - ops.log(self.pick(probabilities, 1, where))
        return ((log_total - self.pick(logits, 1, labels)) * weights).sum(), probabilities

    def bprop(self, logits, labels, weights, out, dout):
        row_weights = weights * dout[0]
        d_logits = out[1] * self.product(row_weights, ops.ones((1, logits.shape[1]), logits.dtype))
        d_logits = ops.tensor_scatter_elements(d_logits, labels, -row_weights, 1, "add")
        return d_logits, ops.zeros_like(labels), ops.zeros_like(weights)
