"""The one model file: a decoder-only transformer, from token ids to logits.

Hidden states travel as [B*S, hidden], so that every linear layer is one plain matrix product. Parameters carry
MindFormers' names, written out in full: wrap the model only in Cells made with `auto_prefix=False`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.alibi import AlibiBias
from llm_core.models.layers import Embedding, Linear, Norm
from llm_core.models.rope import RotaryAngles
from llm_core.models.spec import DecoderSpec

LinearFactory = Callable[..., nn.Cell]
"""Called as linear(name, in_size, out_size, bias, std, seed); returns a Cell that maps x [N, in] and a dropout key
(or None) to [N, out]."""


class SelfAttention(nn.Cell):
    """Projections, rotary positions (unless ALiBi), attention. Weights wq, wk, wv (or all in one, w_qkv) and wo."""

    def __init__(self, name: str, layer: int, spec: DecoderSpec, linear: LinearFactory, seed: int | None):
        super().__init__(auto_prefix=False)
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
        self.drop = core_ops.DropoutMask(spec.attention_dropout, 3 * layer) if spec.attention_dropout else None

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
        """`prefix`: keys and values [P, Hkv, D] that stand before the row's own, as they are."""
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

    def __init__(self, name: str, spec: DecoderSpec, linear: LinearFactory, seed: int | None):
        super().__init__(auto_prefix=False)
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

    Hidden dropout applies to what is added to the residual: to each branch, or to the sum of both.
    """

    def __init__(self, layer: int, spec: DecoderSpec, linear: LinearFactory, seed: int | None):
        super().__init__(auto_prefix=False)
        name = f"model.layers.{layer}"
        self.residual = spec.residual
        self.attention_norm = Norm(f"{name}.attention_norm", spec.norm, spec.hidden_size, spec.norm_eps)
        self.attention = SelfAttention(f"{name}.attention", layer, spec, linear, seed)
        if spec.residual != "parallel":
            self.ffn_norm = Norm(f"{name}.ffn_norm", spec.norm, spec.hidden_size, spec.norm_eps)
        self.feed_forward = FeedForward(f"{name}.feed_forward", spec, linear, seed)
        rate = spec.hidden_dropout
        self.attention_drop = core_ops.Dropout(rate, 3 * layer + 1) if rate else None
        self.ffn_drop = core_ops.Dropout(rate, 3 * layer + 2) if rate else None

    def construct(
        self, x: Tensor, angles: tuple | None, mask: Tensor, key: Tensor | None, batch: int, prefix: tuple | None = None
    ) -> Tensor:
        normed = self.attention_norm(x)
        return self.finish(x, normed, self.attention(normed, angles, mask, key, batch, prefix), key)

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor, key: Tensor | None = None) -> Tensor:
        """The layer's output, from its input x, attention_norm(x) and the attention's output, all [B*S, hidden]."""
        if self.residual == "sequential":
            if self.attention_drop is not None and key is not None:
                attended = self.attention_drop(attended, key)
            x = x + attended
            branch = self.feed_forward(self.ffn_norm(x), key)
        elif self.residual == "parallel":
            branch = attended + self.feed_forward(normed, key)
        else:
            branch = attended + self.feed_forward(self.ffn_norm(x), key)
        if self.ffn_drop is not None and key is not None:
            branch = self.ffn_drop(branch, key)
        return x + branch


class Decoder(nn.Cell):
    """Embedding, layers and the last norm: tokens int32 [B, S] -> hidden fp32 [B*S, hidden].

    With a dropout key (int32 [2], see ops.dropout_key) the spec's dropout rates apply; without, none do.

    `prefix` (see `set_prefix`): called with the dropout key, gives a pair of keys and values, fp32 [P, Hkv, D], for
    every layer. They stand before the layer's own, seen by every token, at the position of the text's beginning: not
    turned, and without a bias of ALiBi, as a key of position 0.
    """

    def __init__(self, spec: DecoderSpec, linear: LinearFactory, seed: int | None):
        super().__init__(auto_prefix=False)
        vocab, hidden, std = spec.vocab_size, spec.hidden_size, spec.initializer_range
        self.tok_embeddings = Embedding("model.tok_embeddings", vocab, hidden, std, seed)
        blocks = [Block(i, spec, linear, seed) for i in range(spec.num_layers)]
        self.layers = nn.CellList(blocks, auto_prefix=False)
        self.norm_out = Norm("model.norm_out", spec.norm, hidden, spec.norm_eps)
        self.spec = spec
        self.prefix, self.prefix_length = None, 0
        self.mask = self._mask(0)
        self.angles, self.alibi = None, None
        if spec.position == "rope":
            self.angles = RotaryAngles(spec.rope, spec.head_dim, spec.max_position)
        else:
            self.alibi = AlibiBias(spec.num_heads)

    def set_prefix(self, prefix: nn.Cell, length: int) -> None:
        """Put the trained keys and values of a `length` of P positions before those of every layer, from now on."""
        self.prefix, self.prefix_length = prefix, length
        self.mask = self._mask(length)

    def _mask(self, prefix: int) -> nn.Cell:
        spec = self.spec
        return core_ops.AttentionMask(spec.num_heads, spec.head_dim, prefix, dropout=bool(spec.attention_dropout))

    def construct(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
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
        x = self.tok_embeddings(tokens.reshape(-1))
        prefix = None if self.prefix is None else self.prefix(key)
        i = 0
        for layer in self.layers:
            x = layer(x, angles, mask, key, batch, None if prefix is None else prefix[i])
            i += 1
        return self.norm_out(x)


def describe_operators(spec: DecoderSpec) -> str:
    """One line for a run's log: which operators this model runs on, and why."""
    return core_ops.describe(head_dim=spec.head_dim, attention_dropout=spec.attention_dropout, bf16=spec.bf16)


class CausalLM(nn.Cell):
    """The decoder with its head: tokens int32 [B, S] -> logits fp32 [B, S, V].

    `linear` makes the linear layers by name, by default `Linear`; `seed` None leaves the weights zero, for a model
    about to be loaded.
    """

    def __init__(self, spec: DecoderSpec, linear: LinearFactory | None = None, seed: int | None = 0):
        super().__init__(auto_prefix=False)
        linear = linear or partial(Linear, bf16=spec.bf16)
        self.spec = spec
        self.graph_key: dict[str, Any] = {}  # what shapes its graphs beside the spec: an adapter's settings
        self.model = Decoder(spec, linear, seed)
        self.lm_head = None
        if not spec.tied_head:
            std = spec.initializer_range
            self.lm_head = linear("lm_head", spec.hidden_size, spec.vocab_size, False, std, seed)
        self.tied_product = core_ops.LinearProduct(spec.bf16)

    def head_is_plain(self) -> bool:
        """Whether the head is a product with one matrix and nothing else, so that a loss may work on the matrix."""
        return self.lm_head is None or (type(self.lm_head) is Linear and self.lm_head.bias is None)

    def head_weight(self) -> Tensor:
        """The matrix [V, hidden] of a plain head."""
        return self.model.tok_embeddings.embedding_weight if self.lm_head is None else self.lm_head.weight

    def head(self, hidden: Tensor, key: Tensor | None = None) -> Tensor:
        """Hidden states [N, hidden] and a dropout key -> logits [N, V]."""
        if self.lm_head is None:
            return self.tied_product(hidden, self.model.tok_embeddings.embedding_weight)
        return self.lm_head(hidden, key)

    def construct(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        return self.head(self.model(tokens)).reshape(batch, length, -1)
