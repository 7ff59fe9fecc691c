"""Joined projections (MindFormers' `qkv_concat`): attention.w_qkv = wq, wk, wv and feed_forward.w_gate_hidden = w1, w3,
each concatenated on axis 0 (output rows)."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import numpy as np

from llm_core.checkpoint.dtypes import Head, head_of
from llm_core.errors import UserError

_JOINS = {
    "attention.w_qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "feed_forward.w_gate_hidden": ("feed_forward.w1", "feed_forward.w3"),
}
_PART_OF = {part: joined for joined, parts in _JOINS.items() for part in parts}


def _split_name(name: str) -> tuple[str, str, str]:
    """'model.layers.0.attention.wq.weight' -> ('model.layers.0.', 'attention.wq', '.weight')"""
    pieces = name.rsplit(".", 3)
    if len(pieces) != 4:
        return "", name, ""
    return pieces[0] + ".", f"{pieces[1]}.{pieces[2]}", "." + pieces[3]


def parts_of(name: str) -> list[str]:
    """Names of the split parameters that the joined `name` holds; [] when it is none."""
    start, leaf, end = _split_name(name)
    return [start + part + end for part in _JOINS.get(leaf, ())]


def joined_of(name: str) -> str | None:
    """Name of the joined parameter that would hold the split `name`; None when none would."""
    start, leaf, end = _split_name(name)
    return start + _PART_OF[leaf] + end if leaf in _PART_OF else None


def heads_of(tensors: Mapping[str, np.ndarray]) -> Mapping[str, Head]:
    """Heads of a mapping, without reading values where it knows them."""
    heads = getattr(tensors, "heads", None)
    return heads if heads is not None else {name: head_of(array) for name, array in tensors.items()}


class ConcatView(Mapping[str, np.ndarray]):
    """`tensors` with its projections joined or split, each where `wanted` names the other form.

    The rows of q in w_qkv are the input width of attention.wo (num_heads * head_dim); k and v share the rest.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], wanted: Container[str]):
        self._tensors = tensors
        stored = heads_of(tensors)
        self.heads: dict[str, Head] = {}
        self._rows: dict[str, tuple[str, int, int]] = {}
        for name, head in stored.items():
            joined = joined_of(name)
            if name not in wanted and joined in wanted and joined not in stored:
                self._join(joined, stored)
            elif name not in wanted and any(part in wanted for part in parts_of(name)):
                self._split(name, stored)
            else:
                self.heads[name] = head

    def _join(self, joined: str, stored: Mapping[str, Head]) -> None:
        parts = [stored[part] for part in parts_of(joined) if part in stored]
        if len(parts) == len(parts_of(joined)):
            rows = sum(part.shape[0] for part in parts)
            self.heads[joined] = Head(parts[0].dtype, (rows, *parts[0].shape[1:]))

    def _split(self, name: str, stored: Mapping[str, Head]) -> None:
        head = stored[name]
        parts = parts_of(name)
        rows = head.shape[0]
        sizes = [rows // len(parts)] * len(parts)
        if len(parts) == 3:
            start = _split_name(name)[0]
            output = stored.get(f"{start}attention.wo.weight")
            if output is None:
                raise UserError(f"{name} cannot be split into q, k and v: attention.wo.weight is missing beside it")
            sizes = [output.shape[1], (rows - output.shape[1]) // 2, (rows - output.shape[1]) // 2]
        if sum(sizes) != rows or min(sizes) <= 0:
            raise UserError(f"{name} {list(head.shape)} cannot be split into {len(parts)} projections")
        row = 0
        for part, size in zip(parts, sizes, strict=True):
            self.heads[part] = Head(head.dtype, (size, *head.shape[1:]))
            self._rows[part] = (name, row, row + size)
            row += size

    def shape(self, name: str) -> tuple[int, ...]:
        return self.heads[name].shape

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._rows:
            joined, begin, end = self._rows[name]
            return self._tensors[joined][begin:end]
        if name in self._tensors:
            return self._tensors[name]
        if name not in self.heads:
            raise KeyError(name)
        return np.concatenate([self._tensors[part] for part in parts_of(name)])

    def __contains__(self, name: object) -> bool:
        return name in self.heads

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)
