"""What the loader hands over, and how it becomes the model's input and targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100  # a label that takes no part in the loss


@dataclass(frozen=True)
class Batch:
    """B records of S+1 tokens.

    input_ids: int32 [B, S+1]. labels: int32 [B, S+1] with -100 where nothing is learnt, or None when every
    token that is not padding is learnt. record_ids: int64 [B], the records' numbers in the data set; -1 marks
    a row that only fills the batch (its labels are all -100).
    """

    input_ids: np.ndarray
    labels: np.ndarray | None
    record_ids: np.ndarray


def shift(batch: Batch, pad_token_id: int, ignore_token_id: int = IGNORED) -> tuple[np.ndarray, np.ndarray]:
    """The model's input and its targets: (tokens int32 [B, S], labels int32 [B, S]).

    labels[:, i] is the token that follows tokens[:, i]. It is -100 where it is not learnt: the token at i is
    padding (MindFormers masks by the input; pad_token_id -1: nothing is padding), its own label is
    `ignore_token_id`, or the row only fills the batch.
    """
    tokens = np.ascontiguousarray(batch.input_ids[:, :-1])
    targets = batch.input_ids if batch.labels is None else batch.labels
    labels = targets[:, 1:].copy()
    labels[(tokens == pad_token_id) | (labels == ignore_token_id)] = IGNORED
    labels[batch.record_ids < 0] = IGNORED
    return tokens, labels
