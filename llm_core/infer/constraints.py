"""Constrained beam search (arXiv 1804.06609, 1912.08517): the likeliest texts that hold the words asked for.

Candidates are sorted into banks by how much of the words they hold, and the beams are filled from all banks in turn: a
text that is on its way to a word is not crowded out by likelier ones that are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llm_core.errors import UserError
from llm_core.infer.beam import IMPOSSIBLE, Hypothesis
from llm_core.infer.groups import Finished, choose
from llm_core.infer.request import Request

Words = tuple[tuple[int, ...], ...]
"""What has to stand in the text: one of these words."""


def constraints_from(force_words_ids: Iterable[Sequence]) -> tuple[Words, ...]:
    """Words and lists of alternative words, as token ids. UserError if an alternative is another's beginning."""
    constraints = []
    for entry in force_words_ids:
        words = tuple(tuple(word) for word in (entry if isinstance(entry[0], list | tuple) else [entry]))
        for word in words:
            if any(other != word and other[: len(word)] == word for other in words) or words.count(word) > 1:
                raise UserError(
                    f"force_words_ids: of the alternatives {[list(word) for word in words]}, {list(word)} begins "
                    "another: leave the longer one out"
                )
        constraints.append(words)
    return tuple(constraints)


@dataclass(frozen=True)
class Progress:
    """How much of the constraints a text holds."""

    pending: tuple[Words, ...]
    held: int = 0
    words: Words | None = None  # the constraint that is being written
    path: tuple[int, ...] = ()  # and what of it is there

    @property
    def complete(self) -> bool:
        """Whether all constraints are held."""
        return not self.pending and self.words is None

    def after(self, token: int) -> Progress:
        """The progress with one more token, which counts once: for the constraint begun, or the first that fits."""
        if self.complete:
            return self
        if self.words is not None:
            if token in self.next_tokens():
                return self._along(self.pending, self.words, (*self.path, token))
            return Progress((*self.pending, self.words), self.held)
        for place, words in enumerate(self.pending):
            if any(word[0] == token for word in words):
                return self._along((*self.pending[:place], *self.pending[place + 1 :]), words, (token,))
        return self

    def _along(self, pending: tuple[Words, ...], words: Words, path: tuple[int, ...]) -> Progress:
        if path in words:
            return Progress(pending, self.held + 1)
        return Progress(pending, self.held, words, path)

    def next_tokens(self) -> list[int]:
        """The tokens that lead on: of the constraint begun, else of all that are pending."""
        depth = len(self.path)
        constraints = self.pending if self.words is None else (self.words,)
        return [
            token
            for words in constraints
            for token in dict.fromkeys(word[depth] for word in words if word[:depth] == self.path and word[depth:])
        ]

    def ways_on(self) -> Iterator[tuple[int, Progress]]:
        """The tokens that lead on, and what a text's rank is counted from with each; none if all is there.

        Of several ways on in the constraint begun, transformers counts the second from where the first ends: for a
        rank, not for whether a word is there. So do we.
        """
        counted_from = self
        for token in [] if self.complete else self.next_tokens():
            yield token, counted_from.after(token)
            if self.words is not None and token in counted_from.next_tokens():
                counted_from = replace(counted_from, path=(*counted_from.path, token))

    def bank(self, longest: int) -> int:
        """Its rank. `longest`: tokens of the longest word of all constraints."""
        begun = 0
        if self.words is not None:
            begun = longest - (max(len(word) for word in self.words) - len(self.path))
        return self.held * longest + begun


class ConstrainedSearch:
    """See beam.Search."""

    def __init__(self, request: Request, number: int) -> None:
        self.chain = request.chain
        self.eos_ids = request.eos_ids
        self.limit = request.limits[number * request.per_prompt]
        self.wanted = request.per_prompt
        beams = request.params.num_beams
        self.texts = [request.text(number) for _ in range(beams)]
        progress = Progress(constraints_from(request.params.force_words_ids))
        self.longest = max(len(word) for words in progress.pending for word in words)
        for token in request.prompts[number]:  # words of the prompt count
            progress = progress.after(token)
        self.progress = [progress] * beams  # of each text
        self.scores = np.array([0, *[IMPOSSIBLE] * (beams - 1)], np.float32)
        self.finished = Finished(beams, request.params, self.limit)
        self.done = False
        self.order, self.tokens = list(range(beams)), [request.pad_id] * beams

    def step(self, log_probs: np.ndarray) -> None:
        """See beam.Search."""
        sums = self.chain(log_probs, self.texts) + self.scores[:, None]
        length = self.texts[0].written + 1
        candidates = self.chain.fewest_kept * len(self.texts)
        complete = [progress.complete for progress in self.progress]
        chosen = choose(self.finished, self.texts, sums, self.eos_ids, candidates, complete)
        self.finished.check(float(sums.max()), length)
        self.order, self.tokens, self.scores = self._from_all_banks(sums, *chosen)
        goes_on = list(zip(self.order, self.tokens, strict=True))
        self.texts = [self.texts[row].plus(token) for row, token in goes_on]
        self.progress = [self.progress[row].after(token) for row, token in goes_on]
        self.done = self.finished.done or length == self.limit

    def _from_all_banks(
        self, sums: np.ndarray, rows: list[int], tokens: list[int], values: list[float]
    ) -> tuple[list[int], list[int], np.ndarray]:
        """What goes on: the best of every bank, of the likeliest candidates and those that a constraint asks for."""
        likeliest = list(zip(rows, tokens, strict=True))
        seen = [[*self.texts[row].tokens, token] for row, token in likeliest]
        states = [self.progress[row].after(token) for row, token in likeliest]
        for row, text in enumerate(self.texts):
            for token, state in self.progress[row].ways_on():
                if (candidate := [*text.tokens, token]) not in seen:
                    seen.append(candidate)
                    states.append(state)
                    rows, tokens = [*rows, row], [*tokens, token]
                    values = [*values, float(sums[row, token])]
        scores = np.array(values, np.float32)
        if len(seen) == len(self.texts):
            return rows, tokens, scores
        banks = np.array([state.bank(self.longest) for state in states])
        by_rank = np.argsort(-(banks.astype(np.float32) * 100 + scores), kind="stable")
        chosen = by_rank[_take_in_turn(banks[by_rank].tolist(), len(self.texts))]
        return [rows[place] for place in chosen], [tokens[place] for place in chosen], scores[chosen]

    def best(self, count: int) -> list[Hypothesis]:
        """See beam.Search. Texts that hold all words come first; others only where there are too few of those."""
        if not self.finished.done:
            holding = [row for row, progress in enumerate(self.progress) if progress.complete]
            others = [row for row, progress in enumerate(self.progress) if not progress.complete]
            for row in holding + (others if len(holding) < self.wanted else []):
                self.finished.add(self.texts[row], float(self.scores[row]))
        return sorted(self.finished.texts, key=lambda each: -each.score)[:count]


def _take_in_turn(banks: Sequence[int], count: int) -> list[int]:
    """The places of the first of every run of equal `banks`, then of the second of every run ...: `count` of them."""
    turns, previous = [], None
    for bank in banks:
        turns.append(turns[-1] + 1 if bank == previous else 0)
        previous = bank
    return np.argsort(turns, kind="stable")[:count].tolist()
