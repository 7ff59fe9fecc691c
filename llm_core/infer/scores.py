"""From a row of logits to the next token's probabilities, and to a token: numpy, on the host.

The order and meaning of the steps are those of Hugging Face transformers 4.57 `generate`:

    repetition_penalty -> no_repeat_ngram_size -> bad_words_ids -> min_length, min_new_tokens
        -> prefix_allowed_tokens_fn                            (always)
    temperature -> top_k -> top_p -> softmax -> draw           (do_sample)
    argmax                                                     (otherwise)

A beam search gives the log softmax of the logits to these steps, every other search the logits.

Two things differ on purpose. All steps see a row's own tokens only, never the padding to its left, so a prompt gets
the same answer alone and in a batch. And every row draws from its own counter-based stream (Philox, keyed by the
request's seed and the number of the sequence), so neither the batch size nor the neighbours change what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llm_core.errors import UserError
from llm_core.infer.sampling import SamplingParams

NEVER = np.float32(-np.inf)


@dataclass
class Text:
    """A row: its prompt and what has been written behind it, without padding."""

    tokens: list[int]
    prompt_length: int
    prompt: int = 0  # the prompt's number in the request

    @property
    def written(self) -> int:
        """The number of tokens behind the prompt."""
        return len(self.tokens) - self.prompt_length

    def plus(self, token: int) -> Text:
        """A text with one more token."""
        return Text([*self.tokens, token], self.prompt_length, self.prompt)


class ScoreChain:
    """The steps that SamplingParams ask for, as one call: scores fp32 [B, V] and B texts -> scores fp32 [B, V].

    The softmax of the result is the distribution that the next token is drawn from.
    """

    def __init__(self, params: SamplingParams, eos_ids: Iterable[int]) -> None:
        self.params = params
        self.eos_ids = np.asarray(sorted(eos_ids), np.int64)
        # a beam search needs a token that goes on behind those that end
        self.fewest_kept = max(2, 1 + len(self.eos_ids)) if params.num_beams > 1 else 1

    def __call__(self, scores: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
        """UserError for logits that are not numbers, and where a text is left without any token."""
        if np.isnan(scores).any():
            raise UserError("the logits are not numbers (NaN): the weights are damaged or from a run that diverged")
        scores = self._forbid(self._penalize(scores, texts), texts)
        self._require_a_token(scores, texts)
        params = self.params
        if params.greedy:
            return scores
        if params.temperature != 1.0:
            scores = scores / np.float32(params.temperature)
        if params.top_k:
            scores = keep_top_k(scores, max(params.top_k, self.fewest_kept))
        if params.top_p < 1.0:
            scores = keep_top_p(scores, params.top_p, self.fewest_kept)
        return scores

    def _require_a_token(self, scores: np.ndarray, texts: Sequence[Text]) -> None:
        """UserError where nothing is allowed. A beam may end there: other beams of its prompt go on."""
        if self.params.num_beams > 1:
            return
        for row, text in zip(scores, texts, strict=True):
            if row.max() == NEVER:
                raise UserError(
                    f"every token is forbidden behind {text.tokens[-8:]} (prompt {text.prompt}): together min_length, "
                    "min_new_tokens, bad_words_ids, no_repeat_ngram_size and prefix_allowed_tokens_fn leave none"
                )

    def _penalize(self, scores: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
        if self.params.repetition_penalty == 1.0:
            return scores
        seen = np.zeros(scores.shape, bool)
        for row, text in zip(seen, texts, strict=True):
            row[np.asarray(text.tokens, np.int64)] = True
        return penalize_repetition(scores, seen, np.float32(self.params.repetition_penalty))

    def _forbid(self, scores: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
        """A copy in which some tokens are impossible; `scores` itself where none are."""
        params, forbidden = self.params, []
        for text in texts:
            ids: list[int] = []
            if params.no_repeat_ngram_size:
                ids += ends_of_seen_ngrams(text.tokens, params.no_repeat_ngram_size)
            if params.bad_words_ids:
                ids += ends_of_bad_words(text.tokens, params.bad_words_ids, self.eos_ids)
            if text.written < (params.min_new_tokens or params.min_length - text.prompt_length):  # the former wins
                ids += self.eos_ids.tolist()
            forbidden.append(ids)
        if any(forbidden):
            scores = scores.copy()
            for row, ids in zip(scores, forbidden, strict=True):
                row[ids] = NEVER
        if params.prefix_allowed_tokens_fn is not None:
            scores = np.stack([self._allowed(row, text) for row, text in zip(scores, texts, strict=True)])
        return scores

    def _allowed(self, row: np.ndarray, text: Text) -> np.ndarray:
        allowed = list(self.params.prefix_allowed_tokens_fn(text.prompt, list(text.tokens)))
        if not allowed:
            raise UserError(
                f"prefix_allowed_tokens_fn allows no token behind {text.tokens[-8:]} (prompt {text.prompt}): it must "
                "allow at least one, for instance the end of the text"
            )
        if min(allowed) < 0 or max(allowed) >= len(row):
            wrong = min(allowed) if min(allowed) < 0 else max(allowed)
            raise UserError(f"prefix_allowed_tokens_fn allows token {wrong}; the model's vocabulary has {len(row)}")
        only = np.full_like(row, NEVER)
        only[allowed] = row[allowed]
        return only


class Sampler:
    """Chooses one token a step for each of some texts, and writes it behind them."""

    def __init__(self, texts: Sequence[Text], chain: ScoreChain, streams: Sequence[tuple[int, int]]) -> None:
        """`streams`: each text's (seed, number of the sequence)."""
        self.texts = texts
        self.chain = chain
        self.random = [random_stream(*stream) for stream in streams]

    def choose(self, logits: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """logits fp32 [B, V] -> the next tokens of the texts `rows`, int64 [len(rows)]. UserError for NaN logits."""
        if len(rows) < len(logits):
            logits = logits[rows]
        texts = [self.texts[row] for row in rows]
        scores = self.chain(logits, texts)
        if self.chain.params.greedy:
            tokens = scores.argmax(-1)
        else:
            tokens = np.array([draw(each, self.random[row]) for each, row in zip(scores, rows, strict=True)])
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.tokens.append(token)
        return tokens


def random_stream(seed: int, sequence: int) -> np.random.Generator:
    """The random numbers of one answer: those of no other seed or sequence."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, sequence % 2**64]))


def penalize_repetition(scores: np.ndarray, seen: np.ndarray, penalty: np.float32) -> np.ndarray:
    """Divide the positive and multiply the negative scores of the tokens that a row has `seen` (bool [B, V])."""
    return np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)


def ends_of_seen_ngrams(tokens: Sequence[int], size: int) -> list[int]:
    """The tokens that would repeat a run of `size` tokens of the text."""
    begun = list(tokens[len(tokens) - size + 1 :]) if len(tokens) >= size - 1 else None
    starts = range(len(tokens) - size + 1) if begun is not None else ()
    return [tokens[start + size - 1] for start in starts if list(tokens[start : start + size - 1]) == begun]


def ends_of_bad_words(tokens: Sequence[int], words: Sequence[Sequence[int]], eos_ids: np.ndarray) -> list[int]:
    """The last token of each word whose other tokens the text ends with.

    As in transformers, a word is looked for only in a text that is at least as long, and a word that is nothing but
    an end of text is left alone.
    """
    ends = []
    for word in words:
        head = list(word[:-1])
        if not head:
            if word[0] not in eos_ids:
                ends.append(word[0])
        elif len(word) <= len(tokens) and list(tokens[-len(head) :]) == head:
            ends.append(word[-1])
    return ends


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Make every token impossible that scores less than the row's k-th best (equals of the k-th stay)."""
    vocab = scores.shape[-1]
    k = min(k, vocab)
    kth_best = np.partition(scores, vocab - k, axis=-1)[:, vocab - k, None]
    return np.where(scores < kth_best, NEVER, scores)


def keep_top_p(scores: np.ndarray, p: float, fewest: int = 1) -> np.ndarray:
    """Keep, in each row, the fewest most probable tokens whose probabilities add up to `p`; at least `fewest`."""
    return np.stack([_keep_nucleus(row, p, fewest) for row in scores])


def _keep_nucleus(row: np.ndarray, p: float, fewest: int) -> np.ndarray:
    ordered = np.sort(row)
    # cumulated in double and compared in single precision, as torch does: the same tokens fall on each side of p
    below = np.cumsum(softmax(ordered), dtype=np.float64).astype(np.float32)
    removed = int(np.searchsorted(below, np.float32(1 - p), side="right"))
    removed = min(removed, max(len(row) - fewest, 0))
    worst_kept = ordered[removed]
    keep = row > worst_kept
    equals = np.flatnonzero(row == worst_kept)
    keep[equals[len(equals) - (len(row) - removed - np.count_nonzero(keep)) :]] = True
    return np.where(keep, row, NEVER)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in the dtype of `scores`."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Logarithm of the softmax over the last axis, in the dtype of `scores`."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def draw(scores: np.ndarray, random: np.random.Generator) -> int:
    """One token from the softmax of `scores` [V]; one random number is used."""
    possible = np.flatnonzero(scores > NEVER)
    return int(possible[pick(softmax(scores[possible].astype(np.float64)), random)])


def pick(weights: np.ndarray, random: np.random.Generator) -> int:
    """A place of `weights` [N], as likely as its weight, by inverting their cumulated sum; uses one random number."""
    cumulated = np.cumsum(weights, dtype=np.float64)
    place = np.searchsorted(cumulated, random.random() * cumulated[-1], side="right")
    return int(min(place, np.flatnonzero(weights)[-1]))
