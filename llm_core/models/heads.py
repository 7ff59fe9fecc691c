"""What is computed from the last hidden states: the heads beside causal LM, and the training loss of every head.

`build_model` makes the network that a spec describes. Beside `CausalLM` there are three classifiers on the same
decoder, with the layouts of Hugging Face's Llama and Falcon: a class for a whole text (read at its last token), a class
for every token, and the first and last token of an answer within the text.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.models.decoder import CausalLM, Decoder, Piece
from llm_core.models.layers import Linear, Parts
from llm_core.models.spec import HEAD_NAMES, DecoderSpec

ANSWER_STARTS, ANSWER_ENDS = 0, 1  # labels of question answering, see QuestionLoss


def build_model(
    spec: DecoderSpec, parts: Parts | None = None, seed: int | None = 0, piece: Piece | None = None
) -> nn.Cell:
    """The network of `spec`: CausalLM, or by spec.head one of the classifiers.

    parts: makes the decoder's layers by name, and CausalLM's head; default plain ones. seed None: zero weights, for a
    model about to be loaded. piece: a stage of a pipeline, None = the whole.
    """
    if spec.head == "causal":
        return CausalLM(spec, parts, seed, piece)
    if spec.head == "sequence":
        return SequenceClassifier(spec, parts, seed, piece)
    return TokenClassifier(spec, parts, seed, piece)


def training_loss(net: nn.Cell) -> nn.Cell:
    """Cell(tokens, labels, dropout_key) -> (sum of losses, number of labelled places), for the head that `net` has."""
    return QuestionLoss(net) if net.spec.head == "question" else TokenLoss(net)


class TokenClassifier(nn.Cell):
    """The decoder with a linear layer on every token: tokens int32 [B, S] -> logits fp32 [B, S, num_labels].

    The head is `score` (`qa_outputs` for question answering, whose two classes are an answer's first and last token).
    It has a bias, except for a class for the whole text, as in Hugging Face's models. It never comes from `parts`: an
    adapter changes the decoder, and the head, which no checkpoint of a base model holds, is trained whole.
    """

    def __init__(
        self, spec: DecoderSpec, parts: Parts | None = None, seed: int | None = 0, piece: Piece | None = None
    ):
        super().__init__(auto_prefix=False)
        self.spec = spec
        self.graph_key: dict[str, Any] = {}  # as CausalLM's
        self.model = Decoder(spec, parts or Parts(spec.bf16), seed, piece)
        self.score = _fresh_head(spec, seed) if self.model.ends else None
        self.parts = parts or Parts(spec.bf16)

    def head_is_plain(self) -> bool:
        """False: the loss takes the logits, which are few, and not the head's matrix."""
        return False

    def head(self, hidden: Tensor, key: Tensor | None = None) -> Tensor:
        """Hidden states [N, hidden] -> logits [N, num_labels]; as CausalLM's, whose dropout needs a key."""
        return self.score(hidden)

    own_logits = head

    def construct(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        return self.head(self.model(tokens)).reshape(batch, length, -1)


def _fresh_head(spec: DecoderSpec, seed: int | None) -> Linear:
    """The head at a training's start. Never zero: the checkpoint of a base model has no head to be loaded."""
    name, std = HEAD_NAMES[spec.head], spec.initializer_range
    return Linear(name, spec.hidden_size, spec.num_labels, spec.head_has_bias, std, seed or 0, Parts(spec.bf16))


def head_is_fresh(net: TokenClassifier) -> bool:
    """Whether the weights of a classifier's head, made without a seed, are those it was made with: never loaded."""
    return bool(np.array_equal(net.score.weight.asnumpy(), _fresh_head(net.spec, None).weight.asnumpy()))


class SequenceClassifier(TokenClassifier):
    """A class for the whole text: tokens int32 [B, S], last int32 [B] -> logits fp32 [B, num_labels].

    last[b] is the place of row b's last real token, given by whoever padded the row. It is not searched for by the pad
    id: where padding is the id that also ends a text, that finds the wrong token.
    """

    def construct(self, tokens: Tensor, last: Tensor) -> Tensor:
        batch, length = tokens.shape
        rows = ops.arange(batch) * length + last
        return self.head(ops.gather(self.model(tokens), rows, 0))


class TokenLoss(nn.Cell):
    """Sum of token losses and number of supervised tokens, to be divided only over the whole global batch.

    tokens int32 [B, S]; labels int32 [B, S], -100 (any negative id) = ignored; dropout_key int32 [2] from
    `ops.dropout_key`, None = no dropout -> (fp32 [], fp32 []). A label is the next token, or of a classifier the class
    of this token; a text's class stands at its last token alone.
    """

    def __init__(self, net: CausalLM | TokenClassifier):
        super().__init__(auto_prefix=False)
        self.net = net
        self.fused = net.head_is_plain()
        if self.fused:
            self.nll = net.parts.linear_nll(frozen=not net.head_parameter().requires_grad)
        else:
            self.nll = net.parts.token_nll()

    def construct(self, tokens: Tensor, labels: Tensor, dropout_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.of_hidden(self.net.model(tokens, dropout_key), labels, dropout_key)

    def of_hidden(self, hidden: Tensor, labels: Tensor, dropout_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same from what the head reads, fp32 [B*S, hidden]."""
        labels = labels.reshape(-1)
        if self.fused:
            return self.nll(hidden, self.net.head_weight(), labels)
        return self.nll(self.net.own_logits(hidden, dropout_key), labels)


class QuestionLoss(nn.Cell):
    """Loss of question answering: at which place of its row an answer starts, and at which it ends.

    Arguments and results as `TokenLoss`. labels: ANSWER_STARTS one place BEFORE the answer's first token, ANSWER_ENDS
    at its last token. In a record, which `data.batch.shift` moves by one, that is the answer's first place and the one
    behind its last, so that an answer of one token has two marks as well; it cannot begin at a row's first place.
    Each mark costs -log of its place's probability among all places of the row, padding included, as in Hugging Face's.
    """

    def __init__(self, net: TokenClassifier):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, tokens: Tensor, labels: Tensor, dropout_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.of_hidden(self.net.model(tokens, dropout_key), labels, dropout_key)

    def of_hidden(self, hidden: Tensor, labels: Tensor, dropout_key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As TokenLoss's."""
        batch, length = labels.shape
        logits = self.net.head(hidden).reshape(batch, length, 2)
        nll = -ops.log_softmax(logits, 1)
        starts = ops.cast(labels == ANSWER_STARTS, ms.float32)
        ends = ops.cast(labels == ANSWER_ENDS, ms.float32)
        loss = (nll[:, 1:, 0] * starts[:, :-1]).sum() + (nll[:, :, 1] * ends).sum()
        return loss, starts[:, :-1].sum() + ends.sum()
