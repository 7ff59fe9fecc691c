"""The one model file: a decoder-only transformer, from token ids to logits.

Hidden states travel as [B*S, hidden], so that every linear layer is one plain matrix product. Parameters carry
MindFormers' names, written out in full: wrap the model only in Cells made with `auto_prefix=False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.layers import Norm, Parts
from llm_core.models.rope import RotaryAngles
from llm_core.models.spec import DecoderSpec


@dataclass(frozen=True)
class Piece:
    """A part of the model that has these layers only: a stage of a pipeline."""

    layers: tuple[int, ...]
    first: bool  # it has the embedding
    last: bool  # it has the last norm and the head


class SelfAttention(nn.Cell):
    """Projections, rotary positions (unless ALiBi), attention. Weights wq, wk, wv (or all in one, w_qkv) and wo."""

    def __init__(self, name: str, layer: int, spec: DecoderSpec, parts: Parts, seed: int | None):
        super().__init__(auto_prefix=False)
        linear = parts.linear
        self.heads, self.kv_heads, self.dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.sizes = (spec.q_size, spec.kv_size, spec.kv_size)
        self.qkv_concat = spec.qkv_concat
        h, std = spec.hidden_size, spec.initializer_range
        if spec.qkv_concat:
            self.w_qkv = linear(f"{name}.w_qkv", h, sum(self.sizes), spec.qkv_bias, std, seed)
        else:
            self.wq = linear(f"{name}.wq", h, spec.q_size, spec.qkv_bias, std, seed)
            self.wk = linear(f"{name}.wk", h, spec.kv_size, spec.qkv_bias, std, seed)
            self.wv = linear(f"{name}.wv", h, spec.kv_size, spec.qkv_bias, std, seed)
        self.wo = linear(f"{name}.wo", spec.q_size, h, spec.output_bias, std, seed)
        self.rope = core_ops.Rope() if spec.position == "rope" else None
        self.attention = core_ops.Attention(spec.head_dim, bool(spec.attention_dropout), spec.bf16)
        self.drop = None
        if spec.attention_dropout:
            self.drop = core_ops.DropoutMask(spec.attention_dropout, parts.own_site(3 * layer))

    def qkv(
        self, x: Tensor, angles: tuple | None, batch: int, length: int, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B*S, hidden] -> q [B, S, H, D], k and v [B, S, Hkv, D], q and k turned by the `angles` (cos, sin)."""
        if self.qkv_concat:
            q, k, v = ops.split(self.w_qkv(x, key), self.sizes, -1)
        else:
            q, k, v = self.wq(x, key), self.wk(x, key), self.wv(x, key)
        q = q.reshape(batch, length, self.heads, self.dim)
        k = k.reshape(batch, length, self.kv_heads, self.dim)
        if self.rope is not None:
            q, k = self.rope(q, k, angles[0], angles[1])
        return q, k, v.reshape(batch, length, self.kv_heads, self.dim)

    def construct(
        self, x: Tensor, angles: tuple | None, mask: Tensor, key: Tensor | None, batch: int, prefix: tuple | None = None
    ) -> Tensor:
        """x [B*S, hidden]. `prefix`: keys and values [P, Hkv, D] that stand before the row's own, as they are."""
        length = x.shape[0] // batch
        q, k, v = self.qkv(x, angles, batch, length, key)
        if prefix is not None:
            k, v = self._behind(prefix[0], k), self._behind(prefix[1], v)
        keep = None
        if self.drop is not None and key is not None:
            keep = self.drop(key, batch * self.heads * length, k.shape[1])
        out = self.attention(q, k, v, mask, keep)
        return self.wo(out.reshape(batch * length, self.heads * self.dim), key)

    def _behind(self, prefix: Tensor, x: Tensor) -> Tensor:
        """[P, Hkv, D], the same for every row, and x [B, S, Hkv, D] -> [B, P + S, Hkv, D]."""
        shape = (x.shape[0], prefix.shape[0], self.kv_heads, self.dim)
        return ops.concat((ops.broadcast_to(ops.expand_dims(prefix, 0), shape), x), 1)


class FeedForward(nn.Cell):
    """SwiGLU: w2(silu(w1 x) * w3 x), where w1 and w3 may lie in one matrix, w_gate_hidden; or GELU: w2(gelu(w1 x))."""

    def __init__(self, name: str, spec: DecoderSpec, parts: Parts, seed: int | None):
        super().__init__(auto_prefix=False)
        linear = parts.linear
        h, f, bias, std = spec.hidden_size, spec.ffn_size, spec.mlp_bias, spec.initializer_range
        self.gated, self.width = spec.mlp == "swiglu", f
        self.concat = self.gated and spec.qkv_concat
        if self.concat:
            self.w_gate_hidden = linear(f"{name}.w_gate_hidden", h, 2 * f, bias, std, seed)
        else:
            self.w1 = linear(f"{name}.w1", h, f, bias, std, seed)
            if self.gated:
                self.w3 = linear(f"{name}.w3", h, f, bias, std, seed)
        self.w2 = linear(f"{name}.w2", f, h, bias, std, seed)
        self.activation = core_ops.SwiGlu() if self.gated else core_ops.Gelu()

    def construct(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        if not self.gated:
            return self.w2(self.activation(self.w1(x, key)), key)
        if self.concat:
            gate, up = ops.split(self.w_gate_hidden(x, key), self.width, -1)
        else:
            gate, up = self.w1(x, key), self.w3(x, key)
        return self.w2(self.activation(gate, up), key)


class Block(nn.Cell):
    """One layer, with one of three layouts of its residual.

        sequential    x ─┬─ attention_norm ─ attention ─ (+) ─┬─ ffn_norm ─ feed_forward ─ (+) ─ out
                         └────────────────────────────────┘   └─────────────────────────────┘
        parallel      x ─┬─ attention_norm ─┬─ attention ─── (+) ─ (+) ─ out
                         │                  └─ feed_forward ──┘     │
                         └──────────────────────────────────────────┘
        parallel_two_norms: the same, but feed_forward reads ffn_norm(x).

    Hidden dropout applies to what is added to the residual: to each branch, or to the sum of both. What a norm gives
    passes `entry` (see `Parts`) on its way to the linear layers that read it.
    """

    def __init__(self, layer: int, spec: DecoderSpec, parts: Parts, seed: int | None):
        super().__init__(auto_prefix=False)
        name = f"model.layers.{layer}"
        self.residual = spec.residual
        self.attention_norm = Norm(f"{name}.attention_norm", spec.norm, spec.hidden_size, spec.norm_eps)
        self.attention = SelfAttention(f"{name}.attention", layer, spec, parts, seed)
        if spec.residual != "parallel":
            self.ffn_norm = Norm(f"{name}.ffn_norm", spec.norm, spec.hidden_size, spec.norm_eps)
        self.feed_forward = FeedForward(f"{name}.feed_forward", spec, parts, seed)
        self.entry = parts.entry()
        rate = spec.hidden_dropout
        self.attention_drop = core_ops.Dropout(rate, parts.row_site(3 * layer + 1)) if rate else None
        self.ffn_drop = core_ops.Dropout(rate, parts.row_site(3 * layer + 2)) if rate else None

    def construct(
        self, x: Tensor, angles: tuple | None, mask: Tensor, key: Tensor | None, batch: int, prefix: tuple | None = None
    ) -> Tensor:
        normed = self.normed(x)
        return self.finish(x, normed, self.attention(normed, angles, mask, key, batch, prefix), key)

    def normed(self, x: Tensor) -> Tensor:
        """What the attention reads (and where one norm serves both, the feed-forward layer): attention_norm(x)."""
        return self._enter(self.attention_norm(x))

    def _enter(self, x: Tensor) -> Tensor:
        return x if self.entry is None else self.entry(x)

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor, key: Tensor | None = None) -> Tensor:
        """The layer's output, from its input x, `normed`(x) and the attention's output, all [B*S, hidden]."""
        if self.residual == "sequential":
            if self.attention_drop is not None and key is not None:
                attended = self.attention_drop(attended, key)
            x = x + attended
            branch = self.feed_forward(self._enter(self.ffn_norm(x)), key)
        elif self.residual == "parallel":
            branch = attended + self.feed_forward(normed, key)
        else:
            branch = attended + self.feed_forward(self._enter(self.ffn_norm(x)), key)
        if self.ffn_drop is not None and key is not None:
            branch = self.ffn_drop(branch, key)
        return x + branch


class Decoder(nn.Cell):
    """Embedding, layers and the last norm: tokens int32 [B, S] -> hidden fp32 [B*S, hidden].

    With a dropout key (int32 [2], see ops.dropout_key) the spec's dropout rates apply; without, none do.

    `prefix` (see `set_prefix`): called with the dropout key, gives a pair of keys and values, fp32 [P, Hkv, D], for
    every layer. They stand before the layer's own, seen by every token, at the position of the text's beginning: not
    turned, and without a bias of ALiBi, as a key of position 0.

    Of a `piece` that is not the first, the hidden states that it goes on from are an argument; one that is not the last
    returns its last layer's output.
    """

    def __init__(self, spec: DecoderSpec, parts: Parts, seed: int | None, piece: Piece | None = None):
        super().__init__(auto_prefix=False)
        vocab, hidden, std = spec.vocab_size, spec.hidden_size, spec.initializer_range
        piece = piece or Piece(tuple(range(spec.num_layers)), first=True, last=True)
        self.piece = piece
        self.tok_embeddings = None
        if piece.first or (piece.last and spec.tied_head):
            self.tok_embeddings = parts.embedding("model.tok_embeddings", vocab, hidden, std, seed)
        self.indices = piece.layers
        self.layers = nn.CellList([Block(i, spec, parts, seed) for i in piece.layers], auto_prefix=False)
        self.norm_out = Norm("model.norm_out", spec.norm, hidden, spec.norm_eps) if piece.last else None
        self.head_entry = parts.head_entry()
        self.begins, self.ends = piece.first, piece.last
        self.spec = spec
        self.prefix, self.prefix_length = None, 0
        self.mask = self._mask(0)
        self.angles, self.alibi = None, None
        if spec.position == "rope":
            self.angles = RotaryAngles(spec.rope, spec.head_dim, spec.max_position)
        else:
            self.alibi = parts.alibi(spec.num_heads)

    def set_prefix(self, prefix: nn.Cell, length: int) -> None:
        """Put the trained keys and values of a `length` of P positions before those of every layer, from now on."""
        self.prefix, self.prefix_length = prefix, length
        self.mask = self._mask(length)

    def _mask(self, prefix: int) -> nn.Cell:
        spec = self.spec
        return core_ops.AttentionMask(spec.num_heads, spec.head_dim, prefix, dropout=bool(spec.attention_dropout))

    def construct(self, tokens: Tensor, key: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        batch, length = tokens.shape
        positions = ops.arange(length).reshape(1, length)
        keys = self.prefix_length + length
        bias = None
        if self.alibi is not None:  # keys of the prefix: position 0
            bias = self.alibi(ops.maximum(ops.arange(keys) - self.prefix_length, 0).reshape(1, keys))
        mask = self.mask(batch, length, keys, bias=bias)
        angles = None
        if self.angles is not None:
            angles = self.angles(positions, ops.scalar_to_tensor(length, ms.int32))
        if self.begins:
            x = self.tok_embeddings(tokens.reshape(-1))
        prefix = None if self.prefix is None else self.prefix(key)
        i = 0
        for layer in self.layers:
            x = layer(x, angles, mask, key, batch, None if prefix is None else prefix[self.indices[i]])
            i += 1
        return self.finish(x) if self.ends else x

    def finish(self, x: Tensor) -> Tensor:
        """What the head reads, from the last layer's output [N, hidden]."""
        x = self.norm_out(x)
        return x if self.head_entry is None else self.head_entry(x)


def describe_operators(spec: DecoderSpec) -> str:
    """One line for a run's log: which operators this model runs on, and why."""
    return core_ops.describe(head_dim=spec.head_dim, attention_dropout=spec.attention_dropout, bf16=spec.bf16)


class CausalLM(nn.Cell):
    """The decoder with its head: tokens int32 [B, S] -> logits fp32 [B, S, V].

    `seed` None leaves the weights zero, for a model about to be loaded. Of a `piece` (see `Decoder`) that is not the
    last, there is no head.
    """

    def __init__(
        self, spec: DecoderSpec, parts: Parts | None = None, seed: int | None = 0, piece: Piece | None = None
    ):
        super().__init__(auto_prefix=False)
        parts = parts or Parts(spec.bf16)
        self.spec = spec
        self.graph_key: dict[str, Any] = {}  # what shapes its graphs beside the spec: an adapter's settings
        self.model = Decoder(spec, parts, seed, piece)
        self.lm_head = None
        if not spec.tied_head and self.model.ends:
            std = spec.initializer_range
            self.lm_head = parts.linear("lm_head", spec.hidden_size, spec.vocab_size, False, std, seed)
        self.tied_product = core_ops.LinearProduct(spec.bf16)
        self.whole_logits = parts.whole_logits()
        self.parts = parts

    def head_is_plain(self) -> bool:
        """Whether the head is a product with one matrix and nothing else, so that a loss may work on the matrix."""
        return self.lm_head is None or (self.lm_head.is_plain and self.lm_head.bias is None)

    def head_parameter(self) -> Parameter:
        """What is held of the matrix of a plain head."""
        return self.model.tok_embeddings.embedding_weight if self.lm_head is None else self.lm_head.weight

    def head_weight(self) -> Tensor:
        """The matrix [V, hidden] of a plain head."""
        return self.model.tok_embeddings.used_weight() if self.lm_head is None else self.lm_head.used_weight()

    def head(self, hidden: Tensor, key: Tensor | None = None) -> Tensor:
        """Hidden states [N, hidden] and a dropout key -> logits [N, V]."""
        logits = self.own_logits(hidden, key)
        return logits if self.whole_logits is None else self.whole_logits(logits)

    def own_logits(self, hidden: Tensor, key: Tensor | None = None) -> Tensor:
        """As `head`, of the part of the vocabulary that this head has: all of it, unless `parts` cuts it."""
        if self.lm_head is None:
            return self.tied_product(hidden, self.model.tok_embeddings.used_weight())
        return self.lm_head(hidden, key)

    def construct(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        return self.head(self.model(tokens)).reshape(batch, length, -1)
