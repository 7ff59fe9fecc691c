"""How the next token is chosen from a row of logits: numpy, on the host.

The order and meaning of the steps are those of Hugging Face transformers 4.57 `generate`:

    repetition penalty -> min_length -> min_new_tokens        (always)
    temperature -> top_k -> top_p -> softmax -> draw          (do_sample)
    argmax                                                    (otherwise)

Two things differ on purpose. Lengths and the repetition penalty see a row's own tokens only, never the padding to
its left, so a prompt gets the same answer alone and in a batch. And every row draws from its own counter-based
stream (Philox, keyed by the request's seed and the number of the sequence), so neither the batch size nor the
neighbours change what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_core.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """What a user may ask of a generation. The names are MindFormers' and Hugging Face's.

    max_new_tokens counts the answer alone and wins over max_length, which counts prompt and answer together
    (MindFormers' max_decode_length is the same thing under an older name).
    """

    do_sample: bool = False
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("temperature", self.temperature >= 0, "must not be negative; 0 is greedy, 1 changes nothing"),
            ("top_k", self.top_k >= 0, "must not be negative; 0 turns it off"),
            ("top_p", 0 <= self.top_p <= 1, "must be within 0 and 1; 1 turns it off"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be above 0; 1 turns it off"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens > 0, "must be at least 1"),
            ("max_length", self.max_length is None or self.max_length > 0, "must be at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "must not be negative; 0 turns it off"),
            ("min_length", self.min_length >= 0, "must not be negative; 0 turns it off"),
            ("num_return_sequences", self.num_return_sequences >= 1, "must be at least 1"),
            ("stop_strings", all(self.stop_strings), "must not hold an empty string: every text contains it"),
        ):
            if not ok:
                raise UserError(f"{name} {getattr(self, name)!r}: {rule}")
        if self.num_return_sequences > 1 and self.greedy:
            raise UserError(
                f"num_return_sequences {self.num_return_sequences} needs sampling: greedy search has one answer "
                "(set do_sample True and a temperature above 0)"
            )

    @property
    def greedy(self) -> bool:
        """True if the most probable token is always taken (do_sample False, or temperature 0)."""
        return not self.do_sample or self.temperature == 0

    def new_tokens(self, prompt_length: int, max_position: int) -> int:
        """The number of tokens that may be written after a prompt of `prompt_length` tokens.

        Raises UserError if the prompt fills the model's context (`max_position` tokens), or if max_new_tokens does
        not fit behind it. A max_length beyond the context is cut to it, as upstream does.
        """
        if prompt_length >= max_position:
            raise UserError(
                f"the prompt has {prompt_length} tokens and the model's context is {max_position} "
                "(max_position_embedding): shorten the prompt"
            )
        if self.max_new_tokens is not None:
            if prompt_length + self.max_new_tokens > max_position:
                raise UserError(
                    f"the prompt's {prompt_length} tokens and max_new_tokens {self.max_new_tokens} exceed the model's "
                    f"context of {max_position} (max_position_embedding): set max_new_tokens to "
                    f"{max_position - prompt_length} or less, or shorten the prompt"
                )
            return self.max_new_tokens
        total = max_position if self.max_length is None else min(self.max_length, max_position)
        if total <= prompt_length:
            raise UserError(
                f"the prompt has {prompt_length} tokens, and max_length (max_decode_length) {self.max_length} counts "
                "prompt and answer together: raise it, or set max_new_tokens"
            )
        return total - prompt_length


def sampling_params(model_config) -> SamplingParams:
    """The generation keys of a YAML's model.model_config (any object with those attributes) as SamplingParams.

    max_length wins over max_decode_length, and max_new_tokens over both.
    """
    if (model_config.num_beams or 1) > 1:
        raise UserError(f"model.model_config.num_beams {model_config.num_beams}: there is no beam search; set it to 1")
    return SamplingParams(
        do_sample=bool(model_config.do_sample),
        temperature=_default(model_config.temperature, 1.0),
        top_k=_default(model_config.top_k, 0),
        top_p=_default(model_config.top_p, 1.0),
        repetition_penalty=_default(model_config.repetition_penalty, 1.0),
        max_new_tokens=model_config.max_new_tokens,
        max_length=_default(model_config.max_length, model_config.max_decode_length),
        min_new_tokens=_default(model_config.min_new_tokens, 0),
        min_length=_default(model_config.min_length, 0),
        num_return_sequences=_default(model_config.num_return_sequences, 1),
        stop_strings=tuple(model_config.stop_strings or ()),
    )


def _default(value, default):
    return default if value is None else value


class Sampler:
    """Chooses one token a step for each row of a batch and remembers what each row has seen."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        eos_ids: Sequence[int],
        vocab_size: int,
        streams: Sequence[tuple[int, int]],
    ) -> None:
        """`prompts`: each row's ids without padding. `streams`: each row's (seed, number of the sequence)."""
        self.params = params
        self.eos_ids = np.asarray(sorted(eos_ids), np.int64)
        self.prompt_lengths = np.array([len(prompt) for prompt in prompts])
        self.generated = 0
        self.random = [np.random.Generator(np.random.Philox(key=[n % 2**64 for n in stream])) for stream in streams]
        self.seen = None
        if params.repetition_penalty != 1.0:
            self.seen = np.zeros((len(prompts), vocab_size), bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, np.asarray(prompt, np.int64)] = True

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """logits fp32 [B, V] -> the next token of each row, int64 [B]. Not-a-number logits raise UserError."""
        if np.isnan(logits).any():
            raise UserError("the logits are not numbers (NaN): the weights are damaged or from a run that diverged")
        scores = self.scores(logits)
        if self.params.greedy:
            tokens = scores.argmax(-1)
        else:
            tokens = np.array([draw(row, random) for row, random in zip(scores, self.random, strict=True)])
        self.generated += 1
        if self.seen is not None:
            self.seen[np.arange(len(tokens)), tokens] = True
        return tokens

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """logits fp32 [B, V] -> scores fp32 [B, V]; their softmax is the distribution that a draw is made from."""
        params = self.params
        scores = logits
        if self.seen is not None:
            scores = penalize_repetition(scores, self.seen, np.float32(params.repetition_penalty))
        if len(self.eos_ids):
            shortest = params.min_new_tokens or params.min_length - self.prompt_lengths  # the former wins
            too_short = np.broadcast_to(self.generated < shortest, len(scores))
            if too_short.any():
                scores = forbid(scores, too_short, self.eos_ids)
        if params.greedy:
            return scores
        if params.temperature != 1.0:
            scores = scores / np.float32(params.temperature)
        if params.top_k:
            scores = keep_top_k(scores, params.top_k)
        if params.top_p < 1.0:
            scores = keep_top_p(scores, params.top_p)
        return scores


def penalize_repetition(scores: np.ndarray, seen: np.ndarray, penalty: np.float32) -> np.ndarray:
    """Divide the positive and multiply the negative scores of the tokens that a row has `seen` (bool [B, V])."""
    return np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)


def forbid(scores: np.ndarray, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """A copy of `scores` in which the tokens `ids` are impossible in the rows where `rows` (bool [B]) is true."""
    scores = scores.copy()
    scores[np.ix_(rows, ids)] = -np.inf
    return scores


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Make every token impossible that scores less than the row's k-th best (equals of the k-th stay)."""
    vocab = scores.shape[-1]
    k = min(k, vocab)
    kth_best = np.partition(scores, vocab - k, axis=-1)[:, vocab - k, None]
    return np.where(scores < kth_best, np.float32(-np.inf), scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keep, in each row, the fewest most probable tokens whose probabilities add up to `p`; at least one."""
    return np.stack([_keep_nucleus(row, p) for row in scores])


def _keep_nucleus(row: np.ndarray, p: float) -> np.ndarray:
    ordered = np.sort(row)
    # cumulated in double and compared in single precision, as torch does: the same tokens fall on each side of p
    below = np.cumsum(softmax(ordered), dtype=np.float64).astype(np.float32)
    removed = int(np.searchsorted(below, np.float32(1 - p), side="right"))
    removed = min(removed, len(row) - 1)
    worst_kept = ordered[removed]
    keep = row > worst_kept
    equals = np.flatnonzero(row == worst_kept)
    keep[equals[len(equals) - (len(row) - removed - np.count_nonzero(keep)) :]] = True
    return np.where(keep, row, np.float32(-np.inf))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in the dtype of `scores`."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def draw(scores: np.ndarray, random: np.random.Generator) -> int:
    """One token from the softmax of `scores` [V] by inverting its cumulated distribution; one number is consumed."""
    possible = np.flatnonzero(scores > -np.inf)
    cumulated = np.cumsum(softmax(scores[possible].astype(np.float64)))
    place = np.searchsorted(cumulated, random.random() * cumulated[-1], side="right")
    return int(possible[min(place, len(possible) - 1)])
