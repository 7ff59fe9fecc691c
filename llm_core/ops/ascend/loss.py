"""The token loss."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops.auto_generate import cross_entropy_loss

from llm_core.ops.ascend.linear import LinearProduct


class TokenNll(nn.Cell):
    """As the reference's: logits fp32 [N, V], labels int32 [N], negative = ignored -> (fp32 [], fp32 []).

    Ignored labels are weighted out here: the operator's document says that it ignores none if told a negative one.
    """

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        supervised = ops.cast(labels >= 0, ms.float32)
        targets = ops.cast(ops.maximum(labels, 0), ms.int64)
        losses = cross_entropy_loss(logits, targets, None, "none")[0]
        return (losses * supervised).sum(), supervised.sum()


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
