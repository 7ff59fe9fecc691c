"""A batch of texts whose keys and values are kept: what every search mode reads tokens with.

Graphs are compiled for fixed shapes, so lengths come in few sizes ("buckets"):

- A prompt is padded on the left to 16, 32, 64, 128 or 256 columns; a longer one to a multiple of 256, and is then read
  in pieces of 256. So there are at most five prefill graphs a decoder, and the memory for reading does not grow.
- The cache has 64, 128, 256 ... columns: room for the whole answer, but at first no more than 512 (or 256 behind the
  prompt), since every step attends over all of the cache. When an answer outgrows it, keys and values move to a
  cache twice as long; nothing is computed again.

A batch of unequal prompts gives each prompt the tokens it gets alone: padding is never attended to, and positions
count from a row's first real token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import nn

from llm_core.models.cache import CacheColumn, CachedDecoder, CacheOutput, CacheRows, PrefixColumns
from llm_core.models.decoder import CausalLM
from llm_core.models.spec import DecoderSpec
from llm_core.runtime import Compiled

PREFILL_COLUMNS = (16, 32, 64, 128, 256)
SMALLEST_CACHE = 64
FIRST_CACHE = 512
ROOM_BEHIND_PROMPT = 256
KEPT_CACHES = 2  # of the prompts, and of all their beams or of the longer answers


@dataclass
class Timing:
    """Where the time of a Generator's calls went. Steps that compile a graph are not part of the decode figures."""

    first_token_seconds: float = 0.0  # reading the prompts, compiling included
    decode_seconds: float = 0.0
    decode_tokens: int = 0  # tokens of unfinished rows made in decode_seconds


class Shape(NamedTuple):
    """Of a cache, and of the decoders that work on it."""

    batch: int
    length: int  # columns


class Read(NamedTuple):
    """What a decoder returns."""

    logits: np.ndarray  # of the last column, fp32 [B, V]; with output "all" of every column, [B, S, V]
    hidden: np.ndarray | None = None  # with output "hidden": fp32 [B, S, hidden]


class _StepDecoder(CachedDecoder):
    """The cached decoder, cheaper to call again: half a millisecond a token, of seven for a small model.

    At every call MindSpore hands the name of the graph that runs down to each of the model's cells, one Python
    assignment at a time. It changes between prompt and answer only; the rest of the time there is nothing to tell.
    """

    if isinstance(getattr(nn.Cell, "compile_phase", None), property):

        @property
        def compile_phase(self) -> str | None:
            return self._compile_phase

        @compile_phase.setter
        def compile_phase(self, value: str) -> None:
            if value != self._compile_phase:
                nn.Cell.compile_phase.fset(self, value)


class Decoders:
    """A model's cached decoders, made when they are first needed, and the cells that work on their caches.

    There is one cache for each shape, and one decoder of it for each output; all share the model's weights. What has
    been used lately is kept for the next batch, as far as `trim` lets it.
    """

    def __init__(self, net: CausalLM, spec: DecoderSpec) -> None:
        self.net = net
        self.spec = spec
        self.timing = Timing()
        self.caches: dict[Shape, CachedDecoder] = {}  # the one used last at the end
        self._compiled: dict[tuple, Compiled] = {}
        self._met: set[tuple] = set()  # what has been called: its graph is there
        self._weights = [(name, tuple(weight.shape), str(weight.dtype)) for name, weight in net.parameters_and_names()]

    def read(
        self, shape: Shape, tokens: np.ndarray, start: int, kv_start: ms.Tensor, output: CacheOutput, alive: int = 0
    ) -> Read:
        """Read int [B, S] from column `start` on. `alive`: unfinished rows, for the timing."""
        self._cache(shape)
        decoder = self._cell((output, shape), lambda: self._decoder(shape, output), output=output)
        started = time.perf_counter()
        column = ms.Tensor(np.ascontiguousarray(tokens, np.int32))
        found = decoder(column, ms.Tensor(start, ms.int32), kv_start)
        read = Read(*(part.asnumpy() for part in (found if isinstance(found, tuple) else (found,))))
        call = (output, shape, tokens.shape[1])
        if alive and call in self._met:
            self.timing.decode_seconds += time.perf_counter() - started
            self.timing.decode_tokens += alive
        self._met.add(call)
        return read

    def write_prefix(self, shape: Shape, kv_start: ms.Tensor) -> None:
        """The model's trained prefix into the cache. It is computed for each batch of prompts: a training may go on."""
        if self.net.model.prefix is not None:
            self._cell(("prefix", shape), lambda: PrefixColumns(self._cache(shape)))(kv_start)

    def copy_rows(self, source: Shape, target: Shape, order: Sequence[int]) -> None:
        """Row b of the target's cache becomes row order[b] of the source's."""
        copy = self._cell(
            ("rows", target, source), lambda: CacheRows(self._cache(source), self._cache(target)), source=source
        )
        copy(ms.Tensor(np.asarray(order, np.int32)))

    def copy_column(self, shape: Shape, order: Sequence[int], column: int) -> None:
        """In one column of the cache, row b becomes row order[b]."""
        copy = self._cell(("column", shape), lambda: CacheColumn(self._cache(shape)))
        copy(ms.Tensor(np.asarray(order, np.int32)), ms.Tensor(column, ms.int32))

    def grow(self, shape: Shape, longer: Shape) -> None:
        """Move keys and values to a longer cache."""
        old, new = self._cache(shape), self._cache(longer)
        for source, target in zip((*old.keys, *old.values), (*new.keys, *new.values), strict=True):
            dim = source.shape[-1]
            grown = np.zeros((target.shape[0] // new.length, new.length, dim), np.float32)
            grown[:, : old.length] = source.asnumpy().reshape(-1, old.length, dim)
            target.set_data(ms.Tensor(grown.reshape(target.shape)))

    def trim(self) -> None:
        """Between two batches: let go of the caches used longest ago, until all are no larger than the weights.

        The last KEPT_CACHES stay in any case: the next batch is most likely of the same lengths.
        """
        spec = self.spec
        column = 2 * spec.num_layers * spec.kv_size  # values of a row's column
        weights = sum(math.prod(shape) for _, shape, _ in self._weights)
        while len(self.caches) > KEPT_CACHES and weights < column * sum(math.prod(shape) for shape in self.caches):
            oldest = next(iter(self.caches))
            del self.caches[oldest]
            self._compiled = {name: cell for name, cell in self._compiled.items() if oldest not in name}
            self._met = {call for call in self._met if oldest not in call}

    def _cache(self, shape: Shape) -> CachedDecoder:
        """The decoder that owns the cache of a shape."""
        cache = self.caches.pop(shape) if shape in self.caches else _StepDecoder(self.net, *shape)
        self.caches[shape] = cache
        return cache

    def _decoder(self, shape: Shape, output: CacheOutput) -> CachedDecoder:
        cache = self._cache(shape)
        return cache if output == "last" else _StepDecoder(self.net, *shape, output, cache)

    def _cell(self, name: tuple, make: Callable[[], nn.Cell], **key: object) -> Compiled:
        """The cell of that name (what it is, then the shape of its cache), made if there is none yet."""
        if name not in self._compiled:
            key |= {"spec": self.spec, "cache_length": name[1].length, "weights": self._weights}
            self._compiled[name] = Compiled(make().set_train(False), **self.net.graph_key, **key)
        return self._compiled[name]


class CachedBatch:
    """The rows of one batch: reads their prompts, then columns behind them.

    `position` is the column that is read next. A caller that wants some of the last columns forgotten sets it back.
    """

    def __init__(self, decoders: Decoders, prompts: Sequence[Sequence[int]], new_tokens: int, pad_id: int) -> None:
        """`new_tokens`: the most columns that will be read behind the prompts."""
        decoders.trim()
        self.decoders = decoders
        self.prompts = prompts
        self.pad_id = pad_id
        self.columns, self.piece = prompt_columns(max(len(prompt) for prompt in prompts))
        if decoders.spec.position == "rope" and decoders.spec.rope.method == "dynamic_ntk":
            self.piece = self.columns  # the angles of a whole prompt depend on its length
        self.position = self.columns
        self.needed = self.columns + new_tokens
        first = min(self.needed, max(FIRST_CACHE, self.columns + ROOM_BEHIND_PROMPT))
        self.shape = Shape(len(prompts), cache_length(first, self.needed))
        self.kv_start = ms.Tensor(np.array([self.columns - len(prompt) for prompt in prompts], np.int32))

    def read_prompts(self, output: CacheOutput = "last") -> Read:
        """Read the prompts, padded on the left: the logits behind them and, with "hidden", all hidden states."""
        started = time.perf_counter()
        tokens = np.full((len(self.prompts), self.columns), self.pad_id, np.int32)
        for row, ids in enumerate(self.prompts):
            tokens[row, self.columns - len(ids) :] = ids
        self.decoders.write_prefix(self.shape, self.kv_start)
        pieces = [
            self.decoders.read(self.shape, tokens[:, start : start + self.piece], start, self.kv_start, output)
            for start in range(0, self.columns, self.piece)
        ]
        self.decoders.timing.first_token_seconds += time.perf_counter() - started
        hidden = np.concatenate([piece.hidden for piece in pieces], 1) if output == "hidden" else None
        return Read(pieces[-1].logits, hidden)

    def read(self, tokens: np.ndarray, alive: int, output: CacheOutput = "last") -> Read:
        """Read the next columns, int [B, S]. `alive`: the rows that are not finished."""
        while self.position + tokens.shape[1] > self.shape.length:
            longer = self.shape._replace(length=cache_length(2 * self.shape.length, self.needed))
            self.decoders.grow(self.shape, longer)
            self.shape = longer
        read = self.decoders.read(self.shape, tokens, self.position, self.kv_start, output, alive)
        self.position += tokens.shape[1]
        return read

    def spread(self, times: int) -> None:
        """Make `times` rows of each, one behind the other: what has been read is copied, not read again."""
        order = np.repeat(np.arange(self.shape.batch), times)
        spread = self.shape._replace(batch=len(order))
        self.decoders.copy_rows(self.shape, spread, order)
        self.shape = spread
        self.kv_start = ms.Tensor(self.kv_start.asnumpy()[order])

    def reorder(self, order: Sequence[int]) -> None:
        """Row b becomes what row order[b] has been; both are of one prompt."""
        if any(source != row for row, source in enumerate(order)):
            self.decoders.copy_rows(self.shape, self.shape, order)

    def reorder_column(self, order: Sequence[int]) -> None:
        """As `reorder`, for rows that differ in the column that was read last and in no other."""
        self.decoders.copy_column(self.shape, order, self.position - 1)


def prompt_columns(longest: int) -> tuple[int, int]:
    """(columns that the longest prompt is padded to, columns read in one call)."""
    for columns in PREFILL_COLUMNS:
        if longest <= columns:
            return columns, columns
    piece = PREFILL_COLUMNS[-1]
    return _round_up(longest, piece), piece


def cache_length(wanted: int, needed: int) -> int:
    """The cache length for `wanted` columns: a power of two, cut where fewer are all that will be `needed`."""
    length = SMALLEST_CACHE
    while length < wanted:
        length *= 2
    return min(length, _round_up(needed, FIRST_CACHE // 2)) if length > FIRST_CACHE else length


def _round_up(number: int, step: int) -> int:
    return step * -(-number // step)
