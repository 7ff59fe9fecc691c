"""Beam search and beam sample: the likeliest texts of several that are written side by side.

The rules are those of transformers 4.57 `_beam_search`. There a batch is searched as one; here each prompt has its own
BeamSearch, so its answer does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llm_core.infer.request import Request
from llm_core.infer.scores import Text, log_softmax, random_stream, softmax

IMPOSSIBLE = np.float32(-1e9)  # finite, so that sums of it stay in order


@dataclass(frozen=True)
class Hypothesis:
    """A text that a search has found."""

    text: Text
    score: float  # log probability / length ** length_penalty


class Search(Protocol):
    """The search for the answers of one prompt, over num_beams rows."""

    done: bool
    order: Sequence[int]  # after a step: which of the rows before it each row goes on from
    tokens: Sequence[int]  # and the token that each row reads next

    def step(self, log_probs: np.ndarray) -> None:
        """Take log softmax of the logits of all rows, fp32 [num_beams, V], and choose the rows that go on."""

    def best(self, count: int) -> list[Hypothesis]:
        """The best texts found, the best first; if not done, those that are being written count as well."""


def beam_search(request: Request, make: Callable[[Request, int], Search]) -> None:
    """Fill the answers by a search with beams. make(request, number of the prompt) -> its Search."""
    beams, pad = request.params.num_beams, request.pad_id
    batch = request.batch()
    logits = np.repeat(batch.read_prompts().logits, beams, 0)
    batch.spread(beams)
    searches = [make(request, number) for number in range(len(request.prompts))]
    while True:
        order, tokens = np.arange(len(logits)), np.full(len(logits), pad)
        for number, search in enumerate(searches):
            if search.done:
                continue
            rows = slice(number * beams, (number + 1) * beams)
            search.step(log_softmax(logits[rows]))
            order[rows] = number * beams + np.asarray(search.order)
            tokens[rows] = search.tokens
        alive = sum(not search.done for search in searches)
        if not alive or request.is_interrupted():
            break
        batch.reorder(order)
        logits = batch.read(tokens[:, None], alive).logits
    for number, search in enumerate(searches):
        _fill(request, number, search)


def _fill(request: Request, number: int, search: Search) -> None:
    """The answers of one prompt, from its search. Where fewer texts are possible than asked for, some are empty."""
    first = number * request.per_prompt
    for row, found in enumerate(search.best(request.per_prompt), first):
        request.answers[row].score = found.score
        for token in found.text.tokens[found.text.prompt_length :]:
            request.accept(row, token)
            if request.answers[row].finish_reason:
                break
    for answer in request.answers[first : first + request.per_prompt]:
        if not answer.finish_reason:
            answer.finish_reason = "eos" if search.done else "interrupted"


class BeamSearch:
    """Beam search or, with do_sample, beam sample."""

    def __init__(self, request: Request, number: int) -> None:
        self.params = request.params
        self.chain = request.chain
        self.eos_ids = request.eos_ids
        first = number * request.per_prompt
        self.limit = request.limits[first]
        self.random = random_stream(request.answers[first].seed, 0)
        beams = self.params.num_beams
        self.texts = [request.text(number) for _ in range(beams)]
        # only the first of the equal rows counts at first
        self.scores = np.array([0, *[IMPOSSIBLE] * (beams - 1)], np.float32)
        self.found: list[Text | None] = [None] * beams
        self.found_scores = np.full(beams, IMPOSSIBLE)
        self.done = False
        self.order: Sequence[int] = range(beams)
        self.tokens: Sequence[int] = ()
        self._improvable = True

    def step(self, log_probs: np.ndarray) -> None:
        """See Search."""
        beams, vocab = log_probs.shape
        sums = self.chain(log_probs, self.texts) + self.scores[:, None]
        # so many that enough of them go on, whatever number ends
        places, sums = self._candidates(sums.ravel(), self.chain.fewest_kept * beams)
        rows, tokens = places // vocab, places % vocab
        texts = [self.texts[row].plus(int(token)) for row, token in zip(rows, tokens, strict=True)]
        length = texts[0].written
        ends = np.array([int(token) in self.eos_ids or length == self.limit for token in tokens])

        running = sums + np.where(ends, IMPOSSIBLE, np.float32(0))
        chosen = top(running, beams)
        self.texts = [texts[place] for place in chosen]
        self.scores = running[chosen]
        self.order, self.tokens = rows[chosen], tokens[chosen]

        self._keep_found(texts, sums, ends, length)
        self._improvable = self._improvable and self._can_improve(length)
        enough = self.params.early_stopping is True and self._is_full()
        self.done = bool(not self._improvable or enough or ends.all())

    def _candidates(self, sums: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The places and values of the `count` best of `sums`, or as many drawn without putting back."""
        if self.params.greedy:
            places = top(sums, count)
        else:  # the order of p / e, with e drawn from an exponential distribution, is that of drawing one by one
            places = top(softmax(sums) / self.random.standard_exponential(len(sums)), count)
        return places, sums[places]

    def _keep_found(self, texts: list[Text], sums: np.ndarray, ends: np.ndarray, length: int) -> None:
        """Take those of the best num_beams candidates that end among the texts found, if they are good enough."""
        beams = len(self.found)
        counts = ends & (np.arange(len(ends)) < beams) & self._improvable
        if self.params.early_stopping is True and self._is_full():
            counts[:] = False
        scores = sums / np.float32(length**self.params.length_penalty) + np.where(counts, np.float32(0), IMPOSSIBLE)
        merged = [*self.found, *(text if count else None for text, count in zip(texts, counts, strict=True))]
        scores = np.concatenate([self.found_scores, scores])
        best = top(scores, beams)
        self.found = [merged[place] for place in best]
        self.found_scores = scores[best]

    def _is_full(self) -> bool:
        return all(text is not None for text in self.found)

    def _can_improve(self, length: int) -> bool:
        """Whether a text that goes on may still become better than the worst found: early_stopping's rules."""
        penalty = self.params.length_penalty
        if self.params.early_stopping == "never" and penalty > 0:
            length = self.limit
        best = self.scores[0] / np.float32(length**penalty)
        worst = self.found_scores.min()
        return any(best > (IMPOSSIBLE if text is None else worst) for text in self.found)

    def best(self, count: int) -> list[Hypothesis]:
        """See Search."""
        found = [
            Hypothesis(text, float(score))
            for text, score in zip(self.found, self.found_scores, strict=True)
            if text is not None
        ]
        if not self.done:
            penalty = self.params.length_penalty
            found += [
                Hypothesis(text, float(score) / text.written**penalty)
                for text, score in zip(self.texts, self.scores, strict=True)
            ]
        return sorted(found, key=lambda each: -each.score)[:count]


def top(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` highest of `values` [N], the highest first; of equals, the first."""
    count = min(count, len(values))
    places = np.argpartition(-values, count - 1)[:count]
    return places[np.lexsort((places, -values[places]))]
