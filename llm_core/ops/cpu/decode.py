"""A whole decoder layer for one new token a row."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, Tensor, nn

from llm_core.ops.cpu.custom import kernel


class DecodeLayer(nn.Cell):
    """One sequential layer (RMSNorm, rotary positions, SwiGLU, no biases) for one new token in each of a few rows.

    x fp32 [B, hidden]; the layer's weights; its cache, two parameters [B * Hkv * T, D] that get the new keys and values
    in place; cos and sin fp32 [1|B, 1, 1, D]; column int32 [1], the cache column of the token; kv_start int32 [B]
    -> fp32 [B, hidden]. For inference: it has no gradient.
    """

    def __init__(self, eps: float):
        super().__init__(auto_prefix=False)
        self.eps = Tensor(np.array([eps], np.float32))
        self.kernel = kernel("decode_layer", lambda x, *rest: x, in_place=True)

    def construct(
        self, x: Tensor, weights: tuple, keys: Parameter, values: Parameter, cos: Tensor, sin: Tensor,
        column: Tensor, kv_start: Tensor,
    ) -> Tensor:
        """weights: attention_norm [hidden], wq, wk, wv, wo, ffn_norm [hidden], w1, w3, w2."""
        attention_norm, wq, wk, wv, wo, ffn_norm, w1, w3, w2 = weights
        return self.kernel(
            x, attention_norm, wq, wk, wv, wo, ffn_norm, w1, w3, w2, keys, values, cos, sin, column, kv_start, self.eps
        )
