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
class Sample:
    """One sample before padding: ids int32 [tokens], learnt bool [tokens]."""

    ids: np.ndarray
    learnt: np.ndarray


def encode_samples(tokenizer: Tokenizer, samples: Sequence[Sequence[tuple[str, str]]]) -> list[Sample]:
    """Samples, each a list of rounds (prompt, answer) -> bos, then for each round: prompt, answer, eos.

    Each round is encoded as one text. Learnt are the answers and the eos after them.
    """
    encoded = iter(tokenizer.encode_parts([parts for rounds in samples for parts in rounds]))
    return [_join(tokenizer, [next(encoded) for _ in rounds]) for rounds in samples]


def _join(tokenizer: Tokenizer, rounds: list[tuple[np.ndarray, np.ndarray]]) -> Sample:
    bos, eos = tokenizer.start_ids, tokenizer.end_ids
    ids: list[np.ndarray | list[int]] = [bos]
    lengths = [len(bos)]
    for round_ids, (prompt_length, answer_length) in rounds:
        ids += [round_ids, eos]
        lengths += [prompt_length, answer_length + len(eos)]
    flags = np.zeros(len(lengths), bool)
    flags[2::2] = True
    return Sample(np.concatenate(ids).astype(np.int32), np.repeat(flags, lengths))


def to_rows(samples: Sequence[Sample], width: int, pad_id: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Samples -> columns {"input_ids", "labels": int32 [rows, width]} and counts.

    A longer sample is cut at the end. A sample that has nothing learnt (left) is dropped, for it would only dilute.
    Counts: tokens, supervised_tokens, masked_tokens (of the rows, padding not counted), cut_samples, cut_tokens,
    dropped_samples.
    """
    kept = [sample for sample in samples if sample.learnt[:width].any()]
    input_ids = np.full((len(kept), width), pad_id, np.int32)
    labels = np.full((len(kept), width), IGNORED, np.int32)
    counts = dict.fromkeys(("tokens", "supervised_tokens", "cut_samples", "cut_tokens"), 0)
    for row, sample in enumerate(kept):
        ids, learnt = sample.ids[:width], sample.learnt[:width]
        input_ids[row, : len(ids)] = ids
        np.copyto(labels[row, : len(ids)], ids, where=learnt)
        counts["tokens"] += len(ids)
        counts["supervised_tokens"] += int(learnt.sum())
        counts["cut_samples"] += len(sample.ids) > width
        counts["cut_tokens"] += max(len(sample.ids) - width, 0)
    counts["masked_tokens"] = counts["tokens"] - counts["supervised_tokens"]
    counts["dropped_samples"] = len(samples) - len(kept)
    return {"input_ids": input_ids, "labels": labels}, counts
