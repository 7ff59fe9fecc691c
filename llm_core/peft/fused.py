"""LoRA across fused projections: one linear layer on one side is two or three on the other.

    one layer -> its parts   exact: the parts share A, and each has its rows of B (and of DoRA's magnitude)
    parts -> one layer       exact, too. Where all parts have the same A, that is A, and the rows of B are put together.
                             Else A is all of theirs, one below the other, and B is block-wise:

                                 [ Bq  0   0  ]   [ Aq ]
                                 [ 0   Bk  0  ] x [ Ak ]     of rank 3r, with the scaling unchanged
                                 [ 0   0   Bv ]   [ Av ]

                             A part without an adapter has zeros for its rows of B.

Falcon's query_key_value, InternLM2's wqkv, and `qkv_concat`'s w_qkv and w_gate_hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from llm_core.errors import UserError


@dataclass(frozen=True)
class Update:
    """LoRA of one linear layer: fp32 a [rank, in], b [out, rank], DoRA's magnitude [out] or None."""

    a: np.ndarray
    b: np.ndarray
    scaling: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def with_rows(self, rows: np.ndarray) -> Update:
        """Of the output rows `rows` alone, in that order."""
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return replace(self, b=self.b[rows], magnitude=magnitude)

    def with_columns(self, first: int, last: int) -> Update:
        """Of the factors `first` to `last` of the rank alone."""
        return replace(self, a=self.a[first:last], b=self.b[:, first:last])

    def widened(self, rank: int) -> Update:
        """The same of a higher rank, by zeros in both factors: their gradients are zero, too."""
        more = rank - self.rank
        if not more:
            return self
        return replace(self, a=np.pad(self.a, ((0, more), (0, 0))), b=np.pad(self.b, ((0, 0), (0, more))))

    def rescaled(self, scaling: float) -> Update:
        """The same with another scaling; B makes up for it."""
        if math.isclose(scaling, self.scaling, rel_tol=1e-9):
            return replace(self, scaling=scaling)
        return replace(self, b=(self.b * (self.scaling / scaling)).astype(np.float32), scaling=scaling)


def split(
    whole: Update, rows: Mapping[str, np.ndarray], table: Mapping[str, list[int]] | None = None
) -> dict[str, Update]:
    """A fused layer's update -> those of its parts. rows: the output rows of each part. table: see `parts_table`."""
    if table is not None and _is_table_of(table, whole, rows):
        return {part: whole.with_rows(rows[part]).with_columns(*columns) for part, columns in table.items()}
    return {part: whole.with_rows(chosen) for part, chosen in rows.items()}


def _is_table_of(table: Mapping[str, list[int]], whole: Update, rows: Mapping[str, np.ndarray]) -> bool:
    """Whether B is zero wherever `table` says that a part does not use a column: it is not once the layer has been
    trained as one."""
    for part, chosen in rows.items():
        first, last = table.get(part, (0, 0))
        if whole.b[chosen, :first].any() or whole.b[chosen, last:].any():
            return False
    return set(table) <= set(rows)


def join(parts: Mapping[str, tuple[Update | None, tuple[int, int]]], name: str) -> Update:
    """Updates of the parts (None: that part has none), each with its layer's shape (out, in) -> one of the fused layer.

    Rows in the order of the parts. `name` is the fused layer's, for the error: with DoRA a part without an update
    cannot be expressed, because its magnitude would be the length of the base's rows.
    """
    there = {part: update for part, (update, _) in parts.items() if update is not None}
    first = next(iter(there.values()))
    dora = first.magnitude is not None
    if dora and len(there) < len(parts):
        missing = ", ".join(part for part in parts if part not in there)
        raise UserError(
            f"{name}: DoRA on {', '.join(there)} but not on {missing} cannot be written as one layer without the "
            "base's weights; train it on all of them, or merge it"
        )
    same = {part: update.rescaled(first.scaling) for part, update in there.items()}
    shared = _share_a(list(same.values()))
    rank = first.rank if shared else sum(update.rank for update in same.values())
    blocks, column = [], 0
    for part, (_, (rows, _)) in parts.items():
        block = np.zeros((rows, rank), np.float32)
        if part in same:
            block[:, column : column + same[part].rank] = same[part].b
            column += 0 if shared else same[part].rank
        blocks.append(block)
    a = first.a if shared else np.concatenate([update.a for update in same.values()])
    magnitude = np.concatenate([update.magnitude for update in same.values()]) if dora else None
    return Update(a, np.concatenate(blocks), first.scaling, magnitude)


def _share_a(updates: list[Update]) -> bool:
    return all(np.array_equal(update.a, updates[0].a) for update in updates)


def parts_table(parts: Mapping[str, Update | None], whole: Update) -> dict[str, list[int]]:
    """Which columns of the joined rank each part uses: what `split` needs to undo `join` exactly."""
    table, column = {}, 0
    for part, update in parts.items():
        if update is not None:
            first = 0 if whole.rank == update.rank else column
            table[part] = [first, first + update.rank]
            column += update.rank
    return table
