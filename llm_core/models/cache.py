"""Generation with a key/value cache: one Cell for the prompt and for every next token."""

from __future__ import annotations

from typing import Literal

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.decoder import Block, CausalLM, SelfAttention
from llm_core.models.rope import RotaryAngles

CacheOutput = Literal["last", "all", "hidden"]
FEW_ROWS = 8  # new tokens for which reading the weights is what takes the time


class CachedDecoder(nn.Cell):
    """Logits of the last column, keeping the keys and values of all columns so far.

    Called as (tokens int32 [B, S], start int32 [], kv_start int32 [B]) -> fp32 [B, V]. `start` is the cache
    column of tokens[:, 0]; row b's first real token lies in column kv_start[b] (left padding), where its
    position 0 is. S is the prompt's width for the prefill and 1 afterwards; one graph is compiled for each S.
    `output` says what is returned instead of the last column's logits: "all" the logits of all columns, fp32 [B, S, V];
    "hidden" the last column's logits, and what the head reads of all columns, fp32 [B, S, hidden].
    `cache`: a decoder of the same sizes, whose keys and values this one shares.
    start + S must not exceed cache_length (the caller checks; the graph cannot).

    A layer's keys are one parameter [B*Hkv*T, D]: heads lie outside positions, so attention reads the cache
    as it lies, and a new token writes B*Hkv rows.

    Where the operators have one for a whole layer (`ops.decode_layer`), a few rows' next tokens go through it.

    A model with a trained prefix of P positions has P columns more than `cache_length`: a row lies in the cache as
    padding, prefix, tokens. The columns of the call leave the prefix out: a real token lies P further right than they
    say. `PrefixColumns` writes the prefix; it has to be called before the first token is read.
    """

    def __init__(
        self,
        net: CausalLM,
        batch_size: int,
        cache_length: int,
        output: CacheOutput = "last",
        cache: CachedDecoder | None = None,
    ):
        super().__init__(auto_prefix=False)
        spec = net.spec
        self.net, self.output = net, output
        self.prefix_length = net.model.prefix_length
        self.batch, self.length = batch_size, cache_length + self.prefix_length
        self.kv_heads, self.dim = spec.num_kv_heads, spec.head_dim
        self.keys = self._cache("keys", spec.num_layers) if cache is None else cache.keys
        self.values = self._cache("values", spec.num_layers) if cache is None else cache.values
        first_rows = np.arange(batch_size * self.kv_heads, dtype=np.int32) * self.length
        self.first_rows = Tensor(first_rows.reshape(-1, 1))
        self.angles, self.alibi = None, None
        if spec.position == "rope":
            self.angles = RotaryAngles(spec.rope, spec.head_dim, cache_length)
        else:
            self.alibi = net.model.alibi
        self.mask = core_ops.CacheMask(spec.head_dim)
        self.attention = core_ops.CachedAttention(spec.head_dim)
        self.update = ops.ScatterUpdate(use_locking=False)
        self.whole_layer = None
        if batch_size <= FEW_ROWS and _has_plain_layers(net):
            self.whole_layer = core_ops.decode_layer(spec.norm_eps)

    def _cache(self, what: str, layers: int) -> ParameterTuple:
        shape = (self.batch * self.kv_heads * self.length, self.dim)
        name = f"cache_{self.batch}x{self.length}.{what}"  # a graph that copies between two decoders needs both
        return ParameterTuple(
            Parameter(Tensor(np.zeros(shape, np.float32)), name=f"{name}.{i}", requires_grad=False)
            for i in range(layers)
        )

    def construct(self, tokens: Tensor, start: Tensor, kv_start: Tensor) -> Tensor:
        batch, width = tokens.shape
        columns = start + ops.arange(width)
        places = columns + self.prefix_length  # in the cache, of real tokens; row b's prefix begins at kv_start[b]
        angles, bias = None, None
        if self.alibi is None:
            angles = self.angles(self._positions(columns, kv_start), start + width - kv_start)
        else:
            bias = self.alibi(self._positions(ops.arange(self.length) - self.prefix_length, kv_start))
        decoder = self.net.model
        x = decoder.tok_embeddings(tokens.reshape(-1))
        if width == 1 and self.whole_layer is not None:
            return self._result(self._whole_layers(x, angles, places, kv_start), batch)
        rows = self._rows(columns, kv_start)
        mask = self.mask(places, kv_start, self.length, bias)
        i = 0
        for layer in decoder.layers:
            normed = layer.normed(x)
            x = layer.finish(x, normed, self._attend(layer.attention, normed, angles, rows, mask, i))
            i += 1
        return self._result(x, batch)

    def _rows(self, columns: Tensor, kv_start: Tensor) -> Tensor:
        """The rows of a cache that the keys of these columns [S] go to: [B*Hkv*S], padding before the prefix."""
        if not self.prefix_length:
            return (self.first_rows + columns).reshape(-1)
        real = ops.cast(columns.reshape(1, 1, -1) >= kv_start.reshape(-1, 1, 1), columns.dtype)
        first = self.first_rows.reshape(self.batch, self.kv_heads, 1)
        return (first + columns + real * self.prefix_length).reshape(-1)

    def _result(self, x: Tensor, batch: int) -> Tensor | tuple[Tensor, Tensor]:
        """What the cell returns, from the last layer's output [B*S, hidden]; see `output`."""
        finish = self.net.model.finish
        if self.output == "last":
            return self.net.head(finish(x.reshape(batch, -1, x.shape[1])[:, -1]))
        hidden = finish(x)
        by_column = hidden.reshape(batch, -1, x.shape[1])
        if self.output == "hidden":
            return self.net.head(by_column[:, -1]), by_column
        logits = self.net.head(hidden)
        return logits.reshape(batch, -1, logits.shape[1])

    def _whole_layers(self, x: Tensor, angles: tuple, places: Tensor, kv_start: Tensor) -> Tensor:
        """All layers, an operator each: x [B, hidden] -> [B, hidden]."""
        column = ops.cast(places, ms.int32)
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


class PrefixColumns(nn.Cell):
    """Writes the trained prefix into a decoder's cache: row b's to the columns before its first real token.

    Called with kv_start as the decoder will be, and before it; the prefix is computed here once for all the tokens that
    follow. Returns kv_start.
    """

    def __init__(self, decoder: CachedDecoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.model = decoder.net.model
        self.batch, self.kv_heads, self.dim = decoder.batch, decoder.kv_heads, decoder.dim
        self.length = decoder.prefix_length
        self.update = ops.ScatterUpdate(use_locking=False)

    def construct(self, kv_start: Tensor) -> Tensor:
        places = ops.expand_dims(kv_start, 1) + ops.arange(self.length)  # [B, P]
        first = self.decoder.first_rows.reshape(self.batch, self.kv_heads, 1)
        rows = (first + ops.expand_dims(places, 1)).reshape(-1)
        prefix = self.model.prefix(None)
        for i in range(len(self.decoder.keys)):
            self.update(self.decoder.keys[i], rows, self._for_every_row(prefix[i][0]))
            self.update(self.decoder.values[i], rows, self._for_every_row(prefix[i][1]))
        return kv_start

    def _for_every_row(self, x: Tensor) -> Tensor:
        """[P, Hkv, D] -> [B*Hkv*P, D]."""
        return ops.tile(ops.transpose(x, (1, 0, 2)).reshape(-1, self.dim), (self.batch, 1))


class CacheRows(nn.Cell):
    """Copies whole rows: row b of the target's cache becomes row order[b] of the source's.

    Called as (order int32 [target's batch]) -> order. Both decoders are of one cache length; they may be the same.
    """

    def __init__(self, source: CachedDecoder, target: CachedDecoder):
        super().__init__(auto_prefix=False)
        self.within = source is target
        self.keys, self.values = target.keys, target.values
        if not self.within:
            self.source_keys, self.source_values = source.keys, source.values
        self.layers, self.batch = len(target.keys), source.batch

    def construct(self, order: Tensor) -> Tensor:
        for i in range(self.layers):
            keys, values = self.keys[i], self.values[i]
            if self.within:
                ops.assign(keys, self._taken(keys, order, keys.shape))
                ops.assign(values, self._taken(values, order, values.shape))
            else:
                ops.assign(keys, self._taken(self.source_keys[i], order, keys.shape))
                ops.assign(values, self._taken(self.source_values[i], order, values.shape))
        return order

    def _taken(self, cache: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
        """Rows `order` of a cache [B*Hkv*T, D], as one of `shape`."""
        return ops.gather(cache.reshape(self.batch, -1), order, 0).reshape(shape)


class CacheColumn(nn.Cell):
    """Copies one column: in it, row b of the cache becomes row order[b]. The other columns stay as they are.

    Called as (order int32 [B], column int32 []) -> order.
    """

    def __init__(self, decoder: CachedDecoder):
        super().__init__(auto_prefix=False)
        self.keys, self.values = decoder.keys, decoder.values
        self.layers, self.kv_heads, self.prefix_length = len(decoder.keys), decoder.kv_heads, decoder.prefix_length
        self.first_rows = decoder.first_rows
        self.update = ops.ScatterUpdate(use_locking=False)

    def construct(self, order: Tensor, column: Tensor) -> Tensor:
        place = column + self.prefix_length
        target = self.first_rows.reshape(-1) + place
        heads = self.first_rows.reshape(-1, self.kv_heads)  # [B, Hkv]
        source = ops.gather(heads, order, 0).reshape(-1) + place
        for i in range(self.layers):
            self.update(self.keys[i], target, ops.gather(self.keys[i], source, 0))
            self.update(self.values[i], target, ops.gather(self.values[i], source, 0))
        return order


def _has_plain_layers(net: CausalLM) -> bool:
    """Whether the layers are of the kind that `ops.decode_layer` computes, with the model's own linear layers."""
    spec = net.spec
    if (spec.norm, spec.residual, spec.position, spec.mlp) != ("rms", "sequential", "rope", "swiglu"):
        return False
    return not spec.qkv_concat and all(_is_plain(layer) for layer in net.model.layers)


def _is_plain(layer: Block) -> bool:
    attention, feed = layer.attention, layer.feed_forward
    linears = (attention.wq, attention.wk, attention.wv, attention.wo, feed.w1, feed.w3, feed.w2)
    return all(
        linear.is_plain and linear.bias is None and linear.exit is None and linear.read is None for linear in linears
    )
