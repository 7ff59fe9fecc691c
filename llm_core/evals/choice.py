"""Four letters to choose from: by their likelihood behind a prompt, or by what the model writes.

By likelihood a letter's score is the log-probability of " A" behind the prompt, and the answer is the letter with the
highest, the first of equals. By generation the model writes greedily, and the answer is the first letter in that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Tensor, nn, ops

from llm_core.data.choices import LETTERS
from llm_core.evals.answers import join_replicas, own_batches, write_texts
from llm_core.evals.choice_prompts import letter_is_certain
from llm_core.infer.generate import Generator
from llm_core.infer.load import end_ids
from llm_core.infer.sampling import SamplingParams
from llm_core.models.decoder import CausalLM
from llm_core.report.console import console
from llm_core.runtime import Compiled
from llm_core.text import Tokenizer
from llm_core.text.chat import PLAIN, chat_format, part_ids

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm

_COLUMN_STEP = 64  # rows are padded to a multiple of it, so that few graphs are compiled
NEW_TOKENS = 16  # of a written answer, where model_config.max_new_tokens is not set


@dataclass(frozen=True)
class LetterIds:
    """A prompt with each letter behind it, as ids: what the four texts share, and how each goes on (at least an id)."""

    shared: np.ndarray
    ends: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Of the longest of the four."""
        return len(self.shared) + max(map(len, self.ends))


def letter_ids(tokenizer: Tokenizer, text: str) -> LetterIds:
    """Each of the four texts is cut by the tokenizer as a whole, so that a prompt's end may depend on the letter."""
    start = tokenizer.start_ids if tokenizer.add_bos else []
    rows = [start + ids for ids in tokenizer.encode_batch([f"{text} {letter}" for letter in LETTERS])]
    shared = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)
    return LetterIds(np.array(rows[0][:shared], np.int32), tuple(tuple(row[shared:]) for row in rows))


class _ChoiceScores(nn.Cell):
    """Log-probabilities of the tokens that follow places: tokens int32 [B, S], places int32 [B, T], candidates int32
    [B, T, 4] -> fp32 [B, T, 4]. The head is computed at the places alone."""

    def __init__(self, net: CausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, tokens: Tensor, places: Tensor, candidates: Tensor) -> Tensor:
        batch, length = tokens.shape
        count = places.shape[1]
        rows = (places + length * ops.arange(batch).reshape(-1, 1)).reshape(-1)
        logits = self.net.head(ops.gather(self.net.model(tokens), rows, 0))
        scores = ops.gather_elements(ops.log_softmax(logits, -1), 1, candidates.reshape(batch * count, -1))
        return scores.reshape(batch, count, -1)


@dataclass(frozen=True)
class _Row:
    """What is run of a question: all letters in one row where each is one token, else a row for each letter."""

    question: int
    letters: list[int]
    ids: list[int]
    first: int  # the place behind which the first candidate stands
    candidates: list[list[int]]  # of each place from `first` on, one id for each of `letters`


def _rows_of(question: int, prompt: LetterIds) -> list[_Row]:
    shared, first = prompt.shared.tolist(), len(prompt.shared) - 1
    if all(len(end) == 1 for end in prompt.ends):
        return [_Row(question, [0, 1, 2, 3], shared, first, [[end[0] for end in prompt.ends]])]
    return [
        _Row(question, [letter], [*shared, *end[:-1]], first, [[token] for token in end])
        for letter, end in enumerate(prompt.ends)
    ]


class ChoiceScorer:
    """Scores the letters behind prompts. Rows are padded on the right, which no earlier token sees."""

    def __init__(self, net: CausalLM, batch_size: int, comm: Comm | None = None) -> None:
        """comm: with other ranks, among whose replicas the batches are shared out."""
        self._batch_size, self._longest, self._comm = batch_size, net.spec.max_position, comm
        self._cell = Compiled(_ChoiceScores(net).set_train(False), spec=net.spec, **net.graph_key)

    def scores(self, prompts: Sequence[LetterIds]) -> np.ndarray:
        """Log-probabilities of the four letters, fp64 [prompts, 4], without a term that a prompt's letters share."""
        rows = [row for number, prompt in enumerate(prompts) for row in _rows_of(number, prompt)]
        rows.sort(key=lambda row: -len(row.ids))
        depth = max((len(row.candidates) for row in rows), default=1)
        batches = own_batches(list(enumerate(rows)), self._batch_size, self._comm)
        found: dict[int, list[float]] = {}
        with console.progress(sum(map(len, batches)), desc="answer", unit="row") as bar:
            for batch in batches:
                for (number, row), scores in zip(batch, self._run([row for _, row in batch], depth), strict=False):
                    found[number] = scores[: len(row.candidates), : len(row.letters)].sum(0).tolist()
                bar.update(len(batch))
        every = np.zeros((len(prompts), len(LETTERS)))
        for number, scores in join_replicas(found, self._comm).items():
            every[rows[number].question, rows[number].letters] = scores
        return every

    def _run(self, rows: Sequence[_Row], depth: int) -> np.ndarray:
        """Of a batch filled up with idle rows: fp64 [batch, depth, 4]; what a row does not ask for is meaningless."""
        widest = max(len(row.ids) for row in rows)
        width = min(_COLUMN_STEP * -(-widest // _COLUMN_STEP), self._longest)
        tokens = np.zeros((self._batch_size, width), np.int32)
        places = np.zeros((self._batch_size, depth), np.int32)
        candidates = np.zeros((self._batch_size, depth, len(LETTERS)), np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row.ids)] = row.ids
            places[number, : len(row.candidates)] = row.first + np.arange(len(row.candidates))
            candidates[number, : len(row.candidates), : len(row.letters)] = row.candidates
        return self._cell(Tensor(tokens), Tensor(places), Tensor(candidates)).asnumpy().astype(np.float64)


class ChoiceWriter:
    """Lets the model write answers, greedily, to prompts as predict has them: InternLMProcessor makes them a chat."""

    def __init__(self, config: Any, net: CausalLM, tokenizer: Tokenizer, comm: Comm | None = None) -> None:
        """comm: as for `ChoiceScorer`."""
        self._comm = comm
        model, name = config.model.config, config.processor.prompt_format
        self._tokenizer, self._batch_size = tokenizer, config.runner_config.batch_size
        self._chat = None if name == PLAIN else chat_format(name, tokenizer)
        ends = [*end_ids(model), *(self._chat.stop_ids if self._chat else ())]
        self._generator = Generator(net, net.spec, eos_ids=ends, pad_id=model.pad_token_id)
        self._params = SamplingParams(
            max_new_tokens=model.max_new_tokens or NEW_TOKENS,
            stop_strings=self._chat.stop_strings if self._chat else (),
        )
        self.room = self._params.max_new_tokens + len(self._ids("A"))
        """Positions that an answer and what a chat puts round a prompt need."""

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """What is written behind each prompt, until a letter is certain."""
        ids = [self._ids(text) for text in prompts]
        options = {"done": letter_is_certain, "batch_size": self._batch_size, "comm": self._comm}
        return write_texts(self._generator, self._tokenizer, ids, self._params, [0] * len(ids), **options)

    def _ids(self, text: str) -> list[int]:
        if self._chat is None:
            return self._tokenizer.encode_prompt(text)
        return part_ids(self._chat.prompt([{"role": "user", "content": text}]), self._tokenizer)
