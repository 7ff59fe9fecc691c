"""Token segments with loss flags -> rows of equal length.

A segment is a text or a list of special ids that is learnt or not. The flag comes from the segment, never from
comparing ids, so that an answer that happens to contain the pad or eos id keeps its labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_core.data.batch import IGNORED
from llm_core.text import Tokenizer

Segment = tuple[str | list[int], bool]  # text or special ids, and whether it is learnt


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


def encode_samples(tokenizer: Tokenizer, samples: Sequence[Sequence[Segment]]) -> Samples:
    """Samples, each a list of segments -> their tokens.

    Texts that follow each other in a sample are encoded as one text; ids between two texts, an empty list too, keep
    them apart.
    """
    texts: list[list[str]] = []
    special_ids: list[int] = []
    lengths: list[int] = []  # of the segments; -1 for a text, whose tokens are not known yet
    learnt: list[bool] = []
    for sample in samples:
        run = None  # of texts
        for content, flag in sample:
            learnt.append(flag)
            if not isinstance(content, str):
                special_ids += content
                lengths.append(len(content))
                run = None
            elif content:
                if run is None:
                    run = []
                    texts.append(run)
                run.append(content)
                lengths.append(-1)
            else:
                lengths.append(0)
    segment_lengths = np.array(lengths, np.int64)
    is_text = segment_lengths < 0
    text_ids, segment_lengths[is_text] = tokenizer.encode_parts(texts)
    token_is_text = np.repeat(is_text, segment_lengths)
    ids = np.empty(len(token_is_text), np.int32)
    ids[token_is_text] = text_ids
    ids[~token_is_text] = special_ids
    ends = np.cumsum([len(sample) for sample in samples], dtype=np.int64)
    tokens_before = np.append(0, np.cumsum(segment_lengths))
    sample_lengths = np.diff(tokens_before[ends], prepend=0)
    return Samples(ids, np.repeat(np.array(learnt, bool), segment_lengths), sample_lengths)


def plain_sample(tokenizer: Tokenizer, prompt: str, answer: str) -> list[Segment]:
    """bos, prompt, answer, eos; learnt are the answer and the eos."""
    return [(tokenizer.start_ids, False), (prompt, False), (answer, True), (tokenizer.end_ids, True)]


def cut_and_count(samples: Samples, width: int, drop_long: bool = False) -> tuple[Samples, dict[str, int]]:
    """Samples of at most `width` tokens, and counts of what that took.

    A longer sample is cut at its end, or with `drop_long` left out. A sample that has nothing learnt (left) is dropped:
    it would only dilute. Counts: tokens, supervised_tokens, masked_tokens (of what remains), cut_samples, cut_tokens,
    dropped_samples (whatever the reason), dropped_long_samples.
    """
    total = len(samples.lengths)
    long = samples.lengths > width
    if drop_long:
        samples = samples.select(~long)
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
        "dropped_samples": total - int(kept.sum()),
        "dropped_long_samples": int(long.sum()) if drop_long else 0,
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
