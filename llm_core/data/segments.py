"""Token segments with loss flags -> rows of equal length.

A segment is a run of tokens that is learnt or not. The flag comes from the text that a segment was made of, never
from comparing ids, so that an answer that happens to contain the pad or eos id keeps its labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_core.data.batch import IGNORED
from llm_core.text import Tokenizer


@dataclass(frozen=True)
class Samples:
    """Samples before padding, end to end: ids int32 [tokens], learnt bool [tokens], lengths int64 [samples]."""

    ids: np.ndarray
    learnt: np.ndarray
    lengths: np.ndarray

    def select(self, kept: np.ndarray) -> Samples:
        """Only the samples where kept bool [samples] is true."""
        tokens = np.repeat(kept, self.lengths)
        return Samples(self.ids[tokens], self.learnt[tokens], self.lengths[kept])

    def cut(self, width: int) -> Samples:
        """Every sample without what is beyond its first `width` tokens."""
        starts = np.cumsum(self.lengths) - self.lengths
        tokens = np.arange(len(self.ids)) - np.repeat(starts, self.lengths) < width
        return Samples(self.ids[tokens], self.learnt[tokens], np.minimum(self.lengths, width))

    def learnt_counts(self) -> np.ndarray:
        """Learnt tokens of each sample, int64 [samples]."""
        ends = np.cumsum(self.lengths)
        running = np.concatenate([[0], np.cumsum(self.learnt)])
        return running[ends] - running[ends - self.lengths]


def encode_samples(tokenizer: Tokenizer, samples: Sequence[Sequence[tuple[str, str]]]) -> Samples:
    """Samples, each a list of rounds (prompt, answer) -> bos, then for each round: prompt, answer, eos.

    Each round is encoded as one text. Learnt are the answers and the eos after them.
    """
    rounds = np.array([len(sample) for sample in samples], np.int64)
    text_ids, counts = tokenizer.encode_parts([parts for sample in samples for parts in sample])
    counts = counts.reshape(-1, 2)
    bos, eos = tokenizer.start_ids, tokenizer.end_ids
    # Segments in order: for each sample its bos, and for each of its rounds prompt, answer, eos.
    first_rounds = np.cumsum(rounds) - rounds
    segment_lengths = np.insert(
        np.column_stack([counts, np.full(len(counts), len(eos))]).reshape(-1), 3 * first_rounds, len(bos)
    )
    is_bos = np.insert(np.zeros(3 * len(counts), bool), 3 * first_rounds, True)
    kind = np.empty(len(is_bos), np.int8)  # 0 prompt, 1 answer, 2 eos, 3 bos
    kind[is_bos] = 3
    kind[~is_bos] = np.tile(np.array([0, 1, 2], np.int8), len(counts))
    token_kind = np.repeat(kind, segment_lengths)
    ids = np.empty(len(token_kind), np.int32)
    ids[token_kind < 2] = text_ids
    ids[token_kind == 2] = eos[0] if eos else 0
    ids[token_kind == 3] = bos[0] if bos else 0
    lengths = np.add.reduceat(segment_lengths, np.flatnonzero(is_bos)) if len(samples) else rounds
    return Samples(ids, (token_kind == 1) | (token_kind == 2), lengths)


def cut_and_count(samples: Samples, width: int) -> tuple[Samples, dict[str, int]]:
    """Samples of at most `width` tokens, and counts of what that took.

    A longer sample is cut at its end. A sample that has nothing learnt (left) is dropped: it would only dilute.
    Counts: tokens, supervised_tokens, masked_tokens (of what remains), cut_samples, cut_tokens, dropped_samples.
    """
    cut = samples.cut(width)
    kept = cut.learnt_counts() > 0
    excess = np.maximum(samples.lengths - width, 0)[kept]
    remaining = cut.select(kept)
    supervised = int(remaining.learnt.sum())
    counts = {
        "tokens": len(remaining.ids),
        "supervised_tokens": supervised,
        "masked_tokens": len(remaining.ids) - supervised,
        "cut_samples": int((excess > 0).sum()),
        "cut_tokens": int(excess.sum()),
        "dropped_samples": int((~kept).sum()),
    }
    return remaining, counts


def to_rows(samples: Samples, width: int, pad_id: int) -> dict[str, np.ndarray]:
    """Samples of at most `width` tokens -> {"input_ids", "labels": int32 [samples, width]}, padded at the end."""
    input_ids = np.full((len(samples.lengths), width), pad_id, np.int32)
    labels = np.full_like(input_ids, IGNORED)
    filled = np.arange(width) < samples.lengths[:, None]
    input_ids[filled] = samples.ids
    labels[filled] = np.where(samples.learnt, samples.ids, IGNORED)
    return {"input_ids": input_ids, "labels": labels}
