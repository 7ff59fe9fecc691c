"""Diverse beam search (arXiv 1610.02424): groups of beams, each kept from choosing what the groups before it chose.

The rules of this and of the constrained search are those of transformers 4.55, the last that has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm_core.infer.beam import IMPOSSIBLE, Hypothesis, top
from llm_core.infer.request import Request
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.scores import Text


class Finished:
    """The best texts that a group of beams has ended, and whether it can stop."""

    def __init__(self, size: int, params: SamplingParams, limit: int) -> None:
        self.size = size
        self.params = params
        self.limit = limit
        self.done = False
        self.texts: list[Hypothesis] = []

    def add(self, text: Text, log_prob: float) -> None:
        """Keep a text if it is among the best `size`."""
        self.texts.append(Hypothesis(text, log_prob / text.written**self.params.length_penalty))
        if len(self.texts) > self.size:
            self.texts.remove(min(self.texts, key=lambda each: each.score))

    def check(self, best_log_prob: float, length: int) -> None:
        """Set `done` if no text of `length` new tokens can become better than the worst that is kept."""
        if self.done or len(self.texts) < self.size:
            return
        penalty = self.params.length_penalty
        if self.params.early_stopping == "never" and penalty > 0:
            length = self.limit
        worst = min(each.score for each in self.texts)
        self.done = self.params.early_stopping is True or worst >= best_log_prob / length**penalty


def choose(
    finished: Finished,
    texts: Sequence[Text],
    sums: np.ndarray,
    eos_ids: frozenset[int],
    candidates: int,
    may_end: Sequence[bool] | None = None,
) -> tuple[list[int], list[int], list[float]]:
    """The rows, tokens and log probabilities that go on, as many as `texts`, of the best sums fp32 [len(texts), V].

    Of the best len(texts) candidates, those that end go to `finished`; with `may_end`, only of the texts that may.
    """
    vocab = sums.shape[1]
    places = top(sums.ravel(), candidates)
    rows, tokens, values = [], [], []
    for rank, place in enumerate(places.tolist()):
        row, token = divmod(place, vocab)
        if token not in eos_ids:
            rows.append(row)
            tokens.append(token)
            values.append(float(sums[row, token]))
        elif rank < len(texts) and (may_end is None or may_end[row]):
            finished.add(texts[row].plus(token), float(sums[row, token]))
        if len(rows) == len(texts):
            break
    return rows, tokens, values


class GroupSearch:
    """See beam.Search."""

    def __init__(self, request: Request, number: int) -> None:
        self.params = request.params
        self.chain = request.chain
        self.eos_ids = request.eos_ids
        self.pad_id = request.pad_id
        self.limit = request.limits[number * request.per_prompt]
        beams = self.params.num_beams
        self.size = beams // self.params.num_beam_groups
        self.texts = [request.text(number) for _ in range(beams)]
        # of each group's equal rows only the first counts at first
        self.scores = np.where(np.arange(beams) % self.size, IMPOSSIBLE, np.float32(0))
        self.finished = [Finished(self.size, self.params, self.limit) for _ in range(self.params.num_beam_groups)]
        self.done = False
        self.order, self.tokens = list(range(beams)), [self.pad_id] * beams

    def step(self, log_probs: np.ndarray) -> None:
        """See beam.Search."""
        length = max(text.written for text in self.texts) + 1
        self.order, self.tokens = list(range(len(self.texts))), [self.pad_id] * len(self.texts)
        for group, finished in enumerate(self.finished):
            if not finished.done:
                self._step_group(group * self.size, finished, log_probs, length)
        self.done = length == self.limit or all(finished.done for finished in self.finished)

    def _step_group(self, first: int, finished: Finished, log_probs: np.ndarray, length: int) -> None:
        rows = slice(first, first + self.size)
        texts = self.texts[rows]
        scores = log_probs[rows]
        if first:  # a group that is done counts with padding
            chosen = np.bincount(self.tokens[:first], minlength=log_probs.shape[1])
            scores = scores - np.float32(self.params.diversity_penalty) * chosen.astype(np.float32)
        sums = self.chain(scores, texts) + self.scores[rows, None]
        sources, tokens, values = choose(finished, texts, sums, self.eos_ids, self.chain.fewest_kept * self.size)
        finished.check(float(sums.max()), length)
        self.texts[rows] = [texts[source].plus(token) for source, token in zip(sources, tokens, strict=True)]
        self.scores[rows] = values
        self.order[rows] = [first + source for source in sources]
        self.tokens[rows] = tokens

    def best(self, count: int) -> list[Hypothesis]:
        """See beam.Search."""
        for group, finished in enumerate(self.finished):
            if not finished.done:
                for row in range(group * self.size, (group + 1) * self.size):
                    finished.add(self.texts[row], float(self.scores[row]))
        found = [each for finished in self.finished for each in finished.texts]
        return sorted(found, key=lambda each: -each.score)[:count]
