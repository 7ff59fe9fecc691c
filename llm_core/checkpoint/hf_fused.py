"""Query, key and value in one tensor, as Falcon's and InternLM2's Hugging Face files hold them: split, and joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llm_core.checkpoint.dtypes import Head
from llm_core.checkpoint.files import TensorFile
from llm_core.checkpoint.hf import name_beside_head, parts_of_fused, to_hf
from llm_core.checkpoint.qkv import heads_of
from llm_core.config.hf_folder import is_hf_folder, qkv_grouping, read_hf_config
from llm_core.errors import UserError


@dataclass(frozen=True)
class QkvLayout:
    """Rows of a fused projection: for each key/value head its query heads, then its key head, then its value head.

    That is all there is: with one key/value head it is Falcon-7B's order (all queries, one key, one value), with as
    many as query heads falcon-rw's ((q, k, v) head by head), in between Falcon-40B's and InternLM2's.
    """

    kv_heads: int
    head_dim: int

    def rows(self, fused_rows: int) -> tuple[int, int, int] | None:
        """Rows of query, key and value in a fused tensor of that many; None when they cannot be these."""
        kv = self.kv_heads * self.head_dim
        if fused_rows % kv or fused_rows < 3 * kv:
            return None
        return fused_rows - 2 * kv, kv, kv

    def part(self, fused: np.ndarray, index: int) -> np.ndarray:
        """Query (0), key (1) or value (2) of a fused weight [rows, in] or bias [rows]."""
        grouped = fused.reshape(self.kv_heads, -1, self.head_dim, *fused.shape[1:])
        chosen = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])[index]
        return np.ascontiguousarray(chosen.reshape(-1, *fused.shape[1:]))

    def join(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The fused tensor of the three parts."""
        grouped = [part.reshape(self.kv_heads, -1, self.head_dim, *part.shape[1:]) for part in (q, k, v)]
        return np.concatenate(grouped, 1).reshape(-1, *q.shape[1:])


class HfView(Mapping[str, np.ndarray]):
    """`tensors` (MindFormers' names, split projections) under the names of a Hugging Face family, fused as it fuses.

    A value is read, and joined, when it is asked for. layout: where the family fuses. two_norms: as for `to_hf`.
    UserError for a name that the family has not, and for a fused projection of which a part is missing.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], family: str, layout: QkvLayout | None = None, two_norms: bool = False
    ):
        self._tensors, self._layout = tensors, layout
        stored = heads_of(tensors)
        self._parts: dict[str, list[str]] = {}
        for name in stored:
            theirs = to_hf(name, family, two_norms)
            if theirs is None:
                raise UserError(f"{name}: a {family} of Hugging Face has no such parameter")
            self._parts.setdefault(name_beside_head(theirs, family, stored), []).append(name)
        self.heads: dict[str, Head] = {}
        for theirs, parts in self._parts.items():
            wanted = parts_of_fused(theirs)
            if wanted:
                missing = sorted(set(wanted) - set(parts))
                if missing:
                    raise UserError(f"{theirs}: {', '.join(missing)} is missing")
                self._parts[theirs] = parts = wanted
            head = stored[parts[0]]
            rows = sum(stored[part].shape[0] for part in parts)
            self.heads[theirs] = Head(head.dtype, (rows, *head.shape[1:]))

    def __getitem__(self, name: str) -> np.ndarray:
        parts = self._parts[name]
        if len(parts) == 1:
            return self._tensors[parts[0]]
        return self._layout.join(*(self._tensors[part] for part in parts))

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)


class SplitFile:
    """An open file of a Hugging Face folder, as one TensorFile in which nothing is fused.

    Its other names stay as they are. A fused tensor is read anew for each of its parts, so that one tensor at a time
    is in memory. UserError where no config.json lies beside the file, since it says how the rows are grouped.
    """

    def __init__(self, file: TensorFile):
        self._file = file
        self.path, self.metadata = file.path, file.metadata
        self.heads: dict[str, Head] = {}
        self._parts: dict[str, tuple[str, int]] = {}
        fused = [name for name in file.heads if parts_of_fused(name)]
        if not is_hf_folder(file.path.parent):
            raise UserError(
                f"{file.path}: {fused[0]} holds query, key and value in one; how their rows are grouped stands in the "
                "model's config.json, which must lie beside the file"
            )
        self._layout = QkvLayout(*qkv_grouping(read_hf_config(file.path.parent)))
        for name, head in file.heads.items():
            if name in fused:
                self._split(name, head)
            else:
                self.heads[name] = head

    def _split(self, name: str, head: Head) -> None:
        rows = self._layout.rows(head.shape[0])
        if rows is None:
            raise UserError(
                f"{self.path}: {name} has {head.shape[0]} rows, which does not fit the "
                f"{self._layout.kv_heads} key/value heads of {self._layout.head_dim} channels in config.json"
            )
        for index, part in enumerate(parts_of_fused(name)):
            self.heads[part] = Head(head.dtype, (rows[index], *head.shape[1:]))
            self._parts[part] = (name, index)

    def read(self, name: str) -> np.ndarray:
        """The tensor, or its part of a fused one."""
        if name not in self._parts:
            return self._file.read(name)
        fused, index = self._parts[name]
        return self._layout.part(self._file.read(fused), index)

    def verify(self) -> None:
        """As the file's own."""
        self._file.verify()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def without_fused(file: TensorFile) -> TensorFile:
    """The open file itself, or a `SplitFile` of it where it holds fused projections."""
    return SplitFile(file) if any(parts_of_fused(name) for name in file.heads) else file
