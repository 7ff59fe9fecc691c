"""Generation with a key/value cache: one Cell for the prompt and for every next token."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.alibi import AlibiBias
from llm_core.models.decoder import Block, CausalLM, SelfAttention
from llm_core.models.layers import Linear
from llm_core.models.rope import RotaryAngles

FEW_ROWS = 8  # new tokens for which reading the weights is what takes the time


class CachedDecoder(nn.Cell):
    """Logits of the last column, keeping the keys and values of all columns so far.

    Called as (tokens int32 [B, S], start int32 [], kv_start int32 [B]) -> fp32 [B, V]. `start` is the cache
    column of tokens[:, 0]; row b's first real token lies in column kv_start[b] (left padding), where its
    position 0 is. S is the prompt's width for the prefill and 1 afterwards; one graph is compiled for each S.
    start + S must not exceed cache_length (the caller checks; the graph cannot).

    A layer's keys are one parameter [B*Hkv*T, D]: heads lie outside positions, so attention reads the cache
    as it lies, and a new token writes B*Hkv rows.

    Where the operators have one for a whole layer (`ops.decode_layer`), a few rows' next tokens go through it.
    """

    def __init__(self, net: CausalLM, batch_size: int, cache_length: int):
        super().__init__(auto_prefix=False)
        spec = net.spec
        self.net = net
        self.batch, self.length = batch_size, cache_length
        self.kv_heads, self.dim = spec.num_kv_heads, spec.head_dim
        self.keys = self._cache("keys", spec.num_layers)
        self.values = self._cache("values", spec.num_layers)
        first_rows = np.arange(batch_size * self.kv_heads, dtype=np.int32) * cache_length
        self.first_rows = Tensor(first_rows.reshape(-1, 1))
        self.angles, self.alibi = None, None
        if spec.position == "rope":
            self.angles = RotaryAngles(spec.rope, spec.head_dim, cache_length)
        else:
            self.alibi = AlibiBias(spec.num_heads)
        self.mask = core_ops.CacheMask(spec.head_dim)
        self.attention = core_ops.CachedAttention(spec.head_dim)
        self.update = ops.ScatterUpdate(use_locking=False)
        self.whole_layer = None
        if batch_size <= FEW_ROWS and _has_plain_layers(net):
            self.whole_layer = core_ops.decode_layer(spec.norm_eps)

    def _cache(self, what: str, layers: int) -> ParameterTuple:
        shape = (self.batch * self.kv_heads * self.length, self.dim)
        return ParameterTuple(
            Parameter(Tensor(np.zeros(shape, np.float32)), name=f"cache.{what}.{i}", requires_grad=False)
            for i in range(layers)
        )

    def construct(self, tokens: Tensor, start: Tensor, kv_start: Tensor) -> Tensor:
        batch, width = tokens.shape
        columns = start + ops.arange(width)
        angles, bias = None, None
        if self.alibi is None:
            angles = self.angles(self._positions(columns, kv_start), start + width - kv_start.min())
        else:
            bias = self.alibi(self._positions(ops.arange(self.length), kv_start))
        decoder = self.net.model
        x = decoder.tok_embeddings(tokens.reshape(-1))
        if width == 1 and self.whole_layer is not None:
            return self.net.head(decoder.norm_out(self._whole_layers(x, angles, columns, kv_start)))
        rows = (self.first_rows + columns).reshape(-1)
        mask = self.mask(columns, kv_start, self.length, bias)
        i = 0
        for layer in decoder.layers:
            normed = layer.attention_norm(x)
            x = layer.finish(x, normed, self._attend(layer.attention, normed, angles, rows, mask, i))
            i += 1
        last = x.reshape(batch, width, -1)[:, -1]
        return self.net.head(decoder.norm_out(last))

    def _whole_layers(self, x: Tensor, angles: tuple, columns: Tensor, kv_start: Tensor) -> Tensor:
        """All layers, an operator each: x [B, hidden] -> [B, hidden]."""
        column = ops.cast(columns, ms.int32)
        i = 0
        for layer in self.net.model.layers:
            attention, feed = layer.attention, layer.feed_forward
            weights = (
                layer.attention_norm.weight, attention.wq.weight, attention.wk.weight, attention.wv.weight,
                attention.wo.weight, layer.ffn_norm.weight, feed.w1.weight, feed.w3.weight, feed.w2.weight,
            )  # fmt: skip
            x = self.whole_layer(x, weights, self.keys[i], self.values[i], angles[0], angles[1], column, kv_start)
            i += 1
        return x

    def _positions(self, columns: Tensor, kv_start: Tensor) -> Tensor:
        """Of cache columns [S], counted from every row's first real token: int32 [B, S], 0 for padding."""
        return ops.maximum(columns.reshape(1, -1) - kv_start.reshape(-1, 1), 0)

    def _attend(
        self, layer: SelfAttention, x: Tensor, angles: tuple | None, rows: Tensor, mask: Tensor, i: int
    ) -> Tensor:
        """Attention of layer i: x [B*S, hidden] -> [B*S, hidden], after writing the new keys and values."""
        width = x.shape[0] // self.batch
        q, k, v = layer.qkv(x, angles, self.batch, width)
        keys = self.update(self.keys[i], rows, self._head_major(k))
        values = self.update(self.values[i], rows, self._head_major(v))
        shape = (self.batch * self.kv_heads, self.length, self.dim)
        out = self.attention(q, keys.reshape(shape), values.reshape(shape), mask)
        return layer.wo(out.reshape(x.shape[0], -1))

    def _head_major(self, x: Tensor) -> Tensor:
        """[B, S, Hkv, D] -> [B*Hkv*S, D]."""
        if x.shape[1] > 1:
            x = ops.transpose(x, (0, 2, 1, 3))
        return x.reshape(-1, self.dim)


def _has_plain_layers(net: CausalLM) -> bool:
    """Whether the layers are of the kind that `ops.decode_layer` computes, with the model's own linear layers."""
    spec = net.spec
    if (spec.norm, spec.residual, spec.position, spec.mlp) != ("rms", "sequential", "rope", "swiglu"):
        return False
    return not spec.qkv_concat and all(_is_plain(layer) for layer in net.model.layers)


def _is_plain(layer: Block) -> bool:
    attention, feed = layer.attention, layer.feed_forward
    linears = (attention.wq, attention.wk, attention.wv, attention.wo, feed.w1, feed.w3, feed.w2)
    return all(type(linear) is Linear and linear.bias is None for linear in linears)
