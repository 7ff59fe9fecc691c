"""What is computed from the logits: the training loss."""

from __future__ import annotations

from mindspore import Tensor, nn

from llm_core import ops as core_ops
from llm_core.models.decoder import CausalLM


class TokenLoss(nn.Cell):
    """Sum of token losses and number of supervised tokens, to be divided only over the whole global batch.

    tokens int32 [B, S]; labels int32 [B, S], -100 (any negative id) = ignored; dropout_key int32 [2] from
    `ops.dropout_key`, None = no dropout -> (fp32 [], fp32 []).
    """

    def __init__(self, net: CausalLM):
        super().__init__(auto_prefix=False)
        self.net = net
        self.nll = core_ops.TokenNll()

    def construct(self, tokens: Tensor, labels: Tensor, dropout_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.net.head(self.net.model(tokens, dropout_key))
        return self.nll(logits, labels.reshape(-1))
