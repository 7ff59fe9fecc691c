"""Assisted generation (arXiv 2211.17192): a small model guesses some tokens ahead, the model itself checks them.

What comes out is what the model alone would write: greedily the same tokens, sampled the same distribution. A batch is
answered one prompt after the other, since each goes ahead by steps of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm_core.infer.batch import CachedBatch
from llm_core.infer.request import Request
from llm_core.infer.scores import Text, pick, random_stream, softmax


def assisted_search(request: Request) -> None:
    """Fill the answers, one a prompt."""
    for row in range(len(request.answers)):
        if request.unfinished([row]):
            _answer(request, row)


def _answer(request: Request, row: int) -> None:
    params, answer, limit = request.params, request.answers[row], request.limits[row]
    width = params.num_assistant_tokens + 1
    text = request.text(row)
    random = random_stream(answer.seed, 0)
    batch = CachedBatch(request.decoders, [text.tokens], limit + width - 2, request.pad_id)
    assistant = _Assistant(request, text, limit, random)
    tokens = [_choose(request.chain(batch.read_prompts().logits, [text])[0], params.greedy, random)]
    while True:
        for token in tokens:
            text.tokens.append(token)
            request.accept(row, token)
            if answer.finish_reason:
                return
        if not request.unfinished([row]):
            return
        guesses, chances = assistant.guess(min(params.num_assistant_tokens, limit - text.written - 1))
        column = np.full((1, width), request.pad_id)
        column[0, : len(guesses) + 1] = [text.tokens[-1], *guesses]
        logits = batch.read(column, 0, "all").logits[0, : len(guesses) + 1]
        scores = request.chain(logits, [text, *_grown(text, guesses)])
        if params.greedy:
            tokens = check_greedily(scores, guesses)
        else:
            tokens = check_by_chance(softmax(scores.astype(np.float64)), chances, guesses, random)
        batch.position = batch.columns + text.written + len(tokens) - 1  # what has been read of what counts
        assistant.forget(text.written + len(tokens) - 1)


class _Assistant:
    """The small model: its own cache of the text, and its guesses of what comes next."""

    def __init__(self, request: Request, text: Text, limit: int, random: np.random.Generator) -> None:
        generator = request.params.assistant
        self.chain = request.chain
        self.text = text
        self.random = random
        self.longest = generator.spec.max_position
        self.batch = None
        if len(text.tokens) < self.longest:  # a longer prompt is answered without its help
            self.batch = CachedBatch(generator.decoders, [text.tokens], limit, request.pad_id)
            self.batch.read_prompts()

    def guess(self, count: int) -> tuple[list[int], np.ndarray]:
        """Up to `count` tokens, and the probabilities [guesses, V] that each was drawn from (greedily: chosen by)."""
        guesses: list[int] = []
        chances: list[np.ndarray] = []
        text = Text(list(self.text.tokens), self.text.prompt_length, self.text.prompt)
        count = min(count, self.longest - len(text.tokens))
        while len(guesses) < count:
            while self.batch.position < self.batch.columns + text.written:
                token = text.tokens[text.prompt_length + self.batch.position - self.batch.columns]
                logits = self.batch.read(np.array([[token]]), 0).logits
            scores = self.chain(logits, [text])[0]
            chances.append(softmax(scores.astype(np.float64)))
            guesses.append(_choose(scores, self.chain.params.greedy, self.random))
            text = text.plus(guesses[-1])
            if guesses[-1] in self.chain.eos_ids:
                break
        return guesses, np.array(chances)

    def forget(self, written: int) -> None:
        """Of the answer only the first `written` tokens are as they have been read."""
        if self.batch is not None:
            self.batch.position = min(self.batch.position, self.batch.columns + written)


def check_greedily(scores: np.ndarray, guesses: Sequence[int]) -> list[int]:
    """The model's own tokens as far as the guesses are right, and one more. scores fp32 [guesses + 1, V]."""
    tokens = scores.argmax(-1).tolist()
    wrong = next((place for place, guess in enumerate(guesses) if guess != tokens[place]), len(guesses))
    return tokens[: wrong + 1]


def check_by_chance(
    wanted: np.ndarray, guessed: np.ndarray, guesses: Sequence[int], random: np.random.Generator
) -> list[int]:
    """Guesses that are kept and one more token, so that all are distributed as the model's own.

    wanted: the model's probabilities [guesses + 1, V]; guessed: those [guesses, V] that the guesses were drawn from. A
    guess is kept with probability wanted / guessed; the first that is not is replaced by a draw from what `wanted` has
    more of than `guessed`.
    """
    tokens: list[int] = []
    for guess, own, theirs in zip(guesses, wanted, guessed, strict=False):
        if random.random() * theirs[guess] > own[guess]:
            more = np.maximum(own - theirs, 0)
            return [*tokens, pick(more if more.any() else own, random)]
        tokens.append(guess)
    return [*tokens, pick(wanted[len(guesses)], random)]


def _grown(text: Text, guesses: Sequence[int]) -> list[Text]:
    """The text with one guess, with two ..."""
    texts = [text]
    for guess in guesses:
        texts.append(texts[-1].plus(guess))
    return texts[1:]


def _choose(scores: np.ndarray, greedy: bool, random: np.random.Generator) -> int:
    return int(scores.argmax()) if greedy else pick(softmax(scores.astype(np.float64)), random)
