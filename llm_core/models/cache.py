"""Generation with a key/value cache: one Cell for the prompt and for every next token."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.decoder import CausalLM
from llm_core.models.rope import rope_tables


class CachedDecoder(nn.Cell):
    """Logits of the last column, keeping keys and values of all columns so far.

    Called as (tokens int32 [B, S], start int32 [], kv_start int32 [B]) -> fp32 [B, V]. `start` is the cache
    column of tokens[:, 0]; row b's first real token lies in column kv_start[b] (left padding), where its
    position 0 is. S is the prompt's width for the prefill and 1 afterwards; one graph is compiled for each S.

    A layer's keys are one parameter [B*Hkv*T, D]: heads lie outside positions, so attention reads the cache
    as it lies, and a new token writes B*Hkv rows.
    """

    def __init__(self, net: CausalLM, batch_size: int, cache_length: int):
        super().__init__(auto_prefix=False)
        spec = net.spec
        self.net = net
        self.batch, self.length = batch_size, cache_length
        self.kv_heads, self.dim = spec.num_kv_heads, spec.head_dim
        shape = (batch_size * self.kv_heads * cache_length, self.dim)
        self.keys = self._parameters("cache.keys", spec.num_layers, shape)
        self.values = self._parameters("cache.values", spec.num_layers, shape)
        cos, sin = rope_tables(spec.rope, spec.head_dim, cache_length)
        self.cos, self.sin = Tensor(cos), Tensor(sin)
        first_rows = np.arange(batch_size * self.kv_heads, dtype=np.int32) * cache_length
        self.first_rows = Tensor(first_rows.reshape(batch_size, self.kv_heads, 1))
        self.columns = Tensor(np.arange(cache_length, dtype=np.int32).reshape(1, 1, cache_length))
        self.attention = core_ops.CachedAttention()
        self.update = ops.ScatterUpdate(use_locking=False)

    def _parameters(self, name: str, count: int, shape: tuple[int, int]) -> ms.ParameterTuple:
        return ms.ParameterTuple(
            Parameter(Tensor(np.zeros(shape, np.float32)), name=f"{name}.{i}", requires_grad=False) for i in range(count)
        )

    def construct(self, tokens: Tensor, start: Tensor, kv_start: Tensor) -> Tensor:
        batch, width = tokens.shape
        columns = start + ops.arange(width).astype(ms.int32)
        rows = (self.first_rows + columns).reshape(-1)
        positions = ops.maximum(columns.reshape(1, width) - kv_start.reshape(batch, 1), 0)
        cos = ops.gather(self.cos, positions, 0).reshape(batch, width, 1, self.dim)
        sin = ops.gather(self.sin, positions, 0).reshape(batch, width, 1, self.dim)
        visible = ops.logical_and(self.columns <= columns.reshape(1, width, 1), self.columns >= kv_start.reshape(batch, 1, 1))
        hidden = ops.cast(ops.logical_not(visible), ms.float32) * core_ops.HIDDEN
        decoder = self.net.model
        x = decoder.tok_embeddings(tokens.reshape(-1))
        i = 0
        for layer in decoder.layers:
            x = x + self._attend(layer.attention, layer.attention_norm(x), cos, sin, rows, hidden, width, i)
            x = x + layer.feed_forward(layer.ffn_norm(x))
            i += 1
        last = decoder.norm_out(x).reshape(batch, width, -1)[:, -1]
        return self.net.head(last)

    def _attend(self, layer, x, cos, sin, rows, hidden, width, i):
        """Attention of one layer: x [B*S, hidden] -> [B*S, hidden]; writes the new keys and values first."""
        q, k, v = layer.qkv(x, self.batch, width)
        q, k = layer.rope(q, cos, sin), layer.rope(k, cos, sin)
        keys = self.update(self.keys[i], rows, self._head_major(k, width))
        values = self.update(self.values[i], rows, self._head_major(v, width))
        shape = (self.batch, self.kv_heads, self.length, self.dim)
        out = self.attention(q, keys.reshape(shape), values.reshape(shape), hidden)
        return layer.wo(out.reshape(self.batch * width, -1))

    def _head_major(self, x: Tensor, width: int) -> Tensor:
        """[B, S, Hkv, D] -> [B*Hkv*S, D]."""
        if width > 1:
            x = ops.transpose(x, (0, 2, 1, 3))
        return x.reshape(-1, self.dim)
