"""What is computed from the last hidden states beside logits: the training loss."""

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
        self.fused = net.head_is_plain()
        self.nll = core_ops.LinearNll(net.spec.bf16) if self.fused else core_ops.TokenNll()

    def construct(self, tokens: Tensor, labels: Tensor, dropout_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, labels = self.net.model(tokens, dropout_key), labels.reshape(-1)
        if self.fused:
            return self.nll(hidden, self.net.head_weight(), labels)
        return self.nll(self.net.head(hidden), labels)
