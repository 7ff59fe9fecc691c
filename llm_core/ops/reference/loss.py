"""Token losses in plain MindSpore operators."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops


class TokenNll(nn.Cell):
    """Sum of -log softmax(logits)[label] over the supervised tokens, and how many they are.

    logits fp32 [N, V]; labels int32 [N], negative = ignored -> (fp32 [], fp32 []). Ignored rows contribute
    exactly 0 to the loss and to the gradient.
    """

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        supervised = ops.cast(labels >= 0, ms.float32)
        safe = ops.maximum(labels, 0)
        shifted = logits - ops.stop_gradient(ops.ReduceMax(keep_dims=True)(logits, -1))
        log_total = ops.log(ops.ReduceSum()(ops.exp(shifted), -1))
        chosen = ops.GatherD()(shifted, 1, safe.reshape(-1, 1)).reshape(-1)
        return ops.ReduceSum()((log_total - chosen) * supervised), ops.ReduceSum()(supervised)
