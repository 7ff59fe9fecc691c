"""Token ids in, token ids out: batched generation over the cached decoder. Knows nothing of text.

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

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mindspore as ms
import numpy as np
from mindspore import nn

from llm_core.errors import UserError
from llm_core.infer.sampling import Sampler, SamplingParams
from llm_core.models.cache import CachedDecoder
from llm_core.models.decoder import CausalLM
from llm_core.models.spec import DecoderSpec
from llm_core.runtime import Compiled

PREFILL_COLUMNS = (16, 32, 64, 128, 256)
SMALLEST_CACHE = 64
FIRST_CACHE = 512
ROOM_BEHIND_PROMPT = 256


@dataclass
class Generation:
    """One answer: `token_ids` are the new tokens, the end-of-text token included if that is what ended it."""

    prompt_ids: list[int]
    seed: int
    sequence: int  # 0-based, among the request's num_return_sequences
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # eos | length | stop (asked for by on_tokens) | interrupted


@dataclass
class Timing:
    """Where the time of a Generator's calls went. Steps that compile a graph are not part of the decode figures."""

    first_token_seconds: float = 0.0  # reading the prompts, compiling included
    decode_seconds: float = 0.0
    decode_tokens: int = 0  # tokens of unfinished rows made in decode_seconds


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


class Generator:
    """Holds a model's decoders, one for each (batch size, cache length) met so far; they share its weights."""

    def __init__(self, net: CausalLM, spec: DecoderSpec, *, eos_ids: Sequence[int], pad_id: int) -> None:
        """`pad_id` fills padding columns; which id it is changes nothing, and -1 (no such token) will do."""
        self.net = net
        self.spec = spec
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id if 0 <= pad_id < spec.vocab_size else 0
        self.timing = Timing()
        self._decoders: dict[tuple[int, int], Compiled] = {}
        self._weights = [(name, tuple(weight.shape), str(weight.dtype)) for name, weight in net.parameters_and_names()]
        self._called: set[tuple[int, int, int]] = set()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seed: int = 0,
        on_tokens: Callable[[int, int], bool | None] | None = None,
        *,
        rows: int = 0,
        interrupted: Callable[[], bool] | None = None,
    ) -> list[Generation]:
        """Answer `prompts` (ids, not empty) in one batch; num_return_sequences answers each, in the prompts' order.

        seed: prompt i draws with seed + i, so it can be repeated alone. on_tokens(row, token) is called for each new
        token, rows numbered like the result; returning True ends that row. rows: run at least that many rows (idle
        ones added), so that the short last batch of many uses the graphs of the others. interrupted() is asked
        before every step; True ends the generation. Raises UserError for an empty or too long prompt.
        """
        answers = [
            Generation(list(prompt), seed + number, sequence)
            for number, prompt in enumerate(prompts)
            for sequence in range(params.num_return_sequences)
        ]
        limits = [self._limit(answer.prompt_ids, params) for answer in answers]
        if not answers:
            return answers
        idle = max(0, rows - len(answers))
        token_rows = [answer.prompt_ids for answer in answers] + [[self.pad_id]] * idle
        streams = [(answer.seed, answer.sequence) for answer in answers] + [(0, 0)] * idle
        sampler = Sampler(token_rows, params, self.eos_ids, self.spec.vocab_size, streams)

        columns, piece = prompt_columns(max(len(row) for row in token_rows))
        needed = columns + max(limits) - 1  # the last token is never read
        first = min(needed, max(FIRST_CACHE, columns + ROOM_BEHIND_PROMPT))
        length = cache_length(first, needed)
        started = time.perf_counter()
        logits, kv_start = self._prefill(token_rows, columns, piece, length)
        self.timing.first_token_seconds += time.perf_counter() - started

        position = columns
        alive = list(range(len(answers)))
        while True:
            tokens = sampler.choose(logits)
            for row in alive:
                self._accept(answers[row], int(tokens[row]), limits[row], row, on_tokens)
            alive = [row for row in alive if not answers[row].finish_reason]
            if alive and interrupted is not None and interrupted():
                for row in alive:
                    answers[row].finish_reason = "interrupted"
                alive = []
            if not alive:
                return answers
            if position == length:
                length = self._grow(len(token_rows), length, needed)
            logits = self._decode(tokens, position, kv_start, length, len(alive))
            position += 1

    def _limit(self, prompt: list[int], params: SamplingParams) -> int:
        if not prompt:
            raise UserError("an empty prompt, and a tokenizer that adds no bos: there is nothing to continue")
        if min(prompt) < 0 or max(prompt) >= self.spec.vocab_size:
            raise UserError(
                f"the prompt has token ids {min(prompt)}..{max(prompt)}, but the model's vocabulary has "
                f"{self.spec.vocab_size}: the tokenizer does not belong to this model"
            )
        return params.new_tokens(len(prompt), self.spec.max_position)

    def _accept(self, answer: Generation, token: int, limit: int, row: int, on_tokens) -> None:
        """Append `token`, and set finish_reason if the answer is finished with it."""
        answer.token_ids.append(token)
        stop = on_tokens is not None and on_tokens(row, token)
        if token in self.eos_ids:
            answer.finish_reason = "eos"
        elif stop:
            answer.finish_reason = "stop"
        elif len(answer.token_ids) == limit:
            answer.finish_reason = "length"

    def _prefill(
        self, token_rows: Sequence[Sequence[int]], columns: int, piece: int, length: int
    ) -> tuple[np.ndarray, ms.Tensor]:
        """Read the prompts, padded on the left to `columns`, `piece` columns a call.

        Returns the logits behind the last column, fp32 [B, V], and kv_start int32 [B].
        """
        tokens = np.full((len(token_rows), columns), self.pad_id, np.int32)
        for row, ids in enumerate(token_rows):
            tokens[row, columns - len(ids) :] = ids
        kv_start = ms.Tensor(np.array([columns - len(ids) for ids in token_rows], np.int32))
        decoder = self._decoder(len(token_rows), length)
        for start in range(0, columns, piece):
            part = ms.Tensor(np.ascontiguousarray(tokens[:, start : start + piece]))
            logits = decoder(part, ms.Tensor(start, ms.int32), kv_start)
        return logits.asnumpy(), kv_start

    def _decode(self, tokens: np.ndarray, position: int, kv_start: ms.Tensor, length: int, alive: int) -> np.ndarray:
        """Read one token a row at cache column `position`; returns logits fp32 [B, V]."""
        decoder = self._decoder(len(tokens), length)
        started = time.perf_counter()
        column = ms.Tensor(tokens.astype(np.int32)[:, None])
        logits = decoder(column, ms.Tensor(position, ms.int32), kv_start).asnumpy()
        if (len(tokens), length) in self._called:
            self.timing.decode_seconds += time.perf_counter() - started
            self.timing.decode_tokens += alive
        self._called.add((len(tokens), length))
        return logits

    def _decoder(self, batch: int, length: int) -> Compiled:
        if (batch, length) not in self._decoders:
            cell = _StepDecoder(self.net, batch, length).set_train(False)
            key = {"spec": self.spec, "cache_length": length, "weights": self._weights}
            self._decoders[batch, length] = Compiled(cell, **key)
        return self._decoders[batch, length]

    def _grow(self, batch: int, length: int, needed: int) -> int:
        """Move keys and values to the decoder of twice the cache length, and return that length."""
        longer = cache_length(2 * length, needed)
        old, new = self._decoder(batch, length).cell, self._decoder(batch, longer).cell
        for source, target in zip((*old.keys, *old.values), (*new.keys, *new.values), strict=True):
            dim = source.shape[-1]
            grown = np.zeros((target.shape[0] // longer, longer, dim), np.float32)
            grown[:, :length] = source.asnumpy().reshape(-1, length, dim)
            target.set_data(ms.Tensor(grown.reshape(target.shape)))
        return longer


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
