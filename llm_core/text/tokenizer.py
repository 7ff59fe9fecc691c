"""What every tokenizer can do: the interface, and all that can be built from offsets alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from llm_core.errors import UserError


@dataclass(frozen=True)
class SpecialToken:
    """A token that a text never contains; only a template writes it. ids: usually one.

    takes_space_before, takes_space_behind: white space around it in the template belongs to it.
    """

    text: str
    ids: tuple[int, ...]
    takes_space_before: bool = False
    takes_space_behind: bool = False


class TextStream(Protocol):
    """Turns ids into text one at a time, for printing while a model generates."""

    def push(self, token: int) -> str:
        """The text that is certain once `token` has come: whole characters only, and often ""."""

    def flush(self) -> str:
        """What was held back; unfinished bytes become U+FFFD."""


class Tokenizer(ABC):
    """One tokenizer file.

    `encode` never reads special tokens out of the text: "</s>" typed by a user is four characters, not the
    end of the sequence. Special tokens enter as ids (`bos_id`, `eos_id` ...; -1 where the tokenizer has
    none).

    Attributes: path, fingerprint (sha256 of the file with its folder's added tokens, hex), vocab_size, bos_id, eos_id,
    pad_id, unk_id, and the policy, add_bos and add_eos (the YAML's add_bos_token, add_eos_token).
    """

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    add_bos: bool = True
    add_eos: bool = False

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without special tokens, in this one thread."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [start, end) of `text` that it stands for.

        When one character takes several tokens (byte fallback), either all of them carry its span or all but
        the last are empty spans at its start.
        """

    @abstractmethod
    def id_to_piece(self, token: int) -> str:
        """The token as the vocabulary spells it, e.g. "▁the" or "<0x0A>"."""

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; control tokens (bos, eos ...) are left out, or spelled with skip_special=False."""

    @abstractmethod
    def stream(self) -> TextStream:
        """A decoder of one growing sequence; its pieces joined are `decode` of all ids."""

    @property
    def special_tokens(self) -> list[SpecialToken]:
        """Every special token of the vocabulary, as a chat template spells it."""
        ids = {token for token in (self.bos_id, self.eos_id, self.pad_id, self.unk_id) if token >= 0}
        return [SpecialToken(self.id_to_piece(token), (token,)) for token in sorted(ids)]

    @property
    def inner(self) -> Tokenizer:
        """The tokenizer of a text that stands behind special tokens: this one, unless it treats a beginning apart."""
        return self

    def adds_ends(self) -> tuple[bool, bool]:
        """Whether the file itself says to begin a text with bos, and to end it with eos."""
        return True, False

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, on request with bos before or eos after it (where the tokenizer has one)."""
        return self._frame(self.encode_batch([text])[0], bos, eos)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of `text` under the policy given at loading."""
        return self.start_ids + self.encode_batch([text])[0] + (self.end_ids if self.add_eos else [])

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, each an int32 array."""
        return [np.array(ids, np.int32) for ids in self.encode_batch(texts)]

    def encode_parts(self, rows: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Encode each row's parts as ONE text; say how many tokens belong to each part.

        A label mask needs this: the tokens are those of the whole text, as a model meets them, and the mask follows
        the characters. A token that lies across a border belongs to the later part.
        Returns ids int32 [tokens of all rows], and tokens of each part int64 [parts of all rows]; both in order.
        """
        each = [self._parts_by_offsets(parts) for parts in rows]
        if not each:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        ids, counts = (np.concatenate(arrays) for arrays in zip(*each, strict=True))
        return ids, counts

    @property
    def bos_ids(self) -> list[int]:
        """[bos_id], or [] where there is none or it is the eos (GPT-2, Falcon)."""
        return [self.bos_id] if self.bos_id >= 0 and self.bos_id != self.eos_id else []

    @property
    def start_ids(self) -> list[int]:
        """What a document begins with: `bos_ids`, or [] where the policy, add_bos, is none."""
        return self.bos_ids if self.add_bos else []

    @property
    def end_ids(self) -> list[int]:
        """What a document ends with: [eos_id], or [] where there is none."""
        return [self.eos_id] if self.eos_id >= 0 else []

    @property
    def pad_or_substitute_id(self) -> int:
        """The id to fill rows with: pad, else unk (Llama's 0), else eos."""
        return next((i for i in (self.pad_id, self.unk_id, self.eos_id) if i >= 0), 0)

    def _parts_by_offsets(self, parts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self.encode_with_offsets("".join(parts))
        borders = list(accumulate(map(len, parts)))[:-1]
        # A token is before a border if it ends there or earlier, unless it is an empty span (the first bytes
        # of the character that begins there).
        before = [sum(1 for start, end in offsets if end <= border and start < border) for border in borders]
        counts = np.diff(np.array([0, *before, len(ids)], np.int64))
        return np.array(ids, np.int32), counts

    def _frame(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        before = [self.bos_id] if bos and self.bos_id >= 0 else []
        after = [self.eos_id] if eos and self.eos_id >= 0 else []
        return before + ids + after

    def _check_ids(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{self.path}: has {self.vocab_size} tokens, and id {token} was to be decoded; it is not "
                    "the tokenizer of this model or of this data"
                )

