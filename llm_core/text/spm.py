"""SentencePiece models (Llama, InternLM): offsets at the speed of plain encoding, byte-exact streaming."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from llm_core.text.folder import Spaces, added_tokens, spaces, special_names
from llm_core.text.pieces import token_pattern
from llm_core.text.spm_model import find_piece, leaves_text_alone, open_model, with_space_in_front
from llm_core.text.tokenizer import SpecialToken, Tokenizer

_SPACE = "▁"


class SentencePieceTokenizer(Tokenizer):
    """A .model file. Works with sentencepiece 0.1.99 to 0.2.3, whose Python interfaces differ.

    What Hugging Face's files beside it say counts: special tokens' names, added tokens, and where a space is put in
    front. The ids are those of transformers' LlamaTokenizer, legacy or not.
    """

    def __init__(self, path: Path, content: bytes, *, is_behind: bool = False) -> None:
        """content: of the model, after `with_added_tokens`. is_behind: for texts behind a special token (`inner`)."""
        self.path = path
        self._content = content
        self._spaces = Spaces.NONE if is_behind else spaces(path.parent)
        if self._spaces is not None:
            content = with_space_in_front(content, self._spaces is not Spaces.NONE)
        self._sp = open_model(path, content)
        self._has_numpy = hasattr(self._sp, "EncodeAsNumpy")
        self._has_offset_mapping = hasattr(self._sp, "EncodeAsOffsetMapping")
        self.vocab_size = self._sp.vocab_size()
        own = {"bos": self._sp.bos_id(), "eos": self._sp.eos_id(), "pad": self._sp.pad_id()}
        names = special_names(path.parent)
        self.bos_id, self.eos_id, self.pad_id = (
            find_piece(self._sp, names[f"{kind}_token"]) if f"{kind}_token" in names else number
            for kind, number in own.items()
        )
        self.unk_id = self._sp.unk_id()
        self._added = {token.text: token for token in added_tokens(path.parent)}
        in_text = sorted((t for t in self._added.values() if not t.is_special), key=lambda token: -len(token.text))
        self._cuts = re.compile(f"({'|'.join(map(token_pattern, in_text))})") if in_text else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        ids = self._sp.encode(list(texts), num_threads=1)
        for number in self._uneven(texts):
            ids[number] = self.encode_with_offsets(texts[number])[0]
        return ids

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer."""
        if not self._has_numpy:
            return super().encode_arrays(texts)
        arrays = self._sp.encode(list(texts), num_threads=1, return_type="numpy")
        for number in self._uneven(texts):
            arrays[number] = np.array(self.encode_with_offsets(texts[number])[0], np.int32)
        return arrays

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See Tokenizer. Of the byte pieces of one character the last has its span, the others are empty."""
        if self._cuts is None:
            return self._encode_run(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for number, part in enumerate(self._cuts.split(text)):  # every second one is an added token
            if number % 2:
                part_ids, spans = [self._id_of_added(part)], [(0, len(part))]
            else:
                part_ids, spans = (self.inner if number else self)._encode_run(part)
            ids += part_ids
            offsets += [(start + a, start + b) for a, b in spans]
            start += len(part)
        return ids, offsets

    def _encode_run(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode_with_offsets` of a text without added tokens."""
        processor = self._keeping_one_space if self._would_lose_space(text) else self._sp
        if self._has_offset_mapping:
            found = processor.encode(text, return_type="offset_mapping")
            return found["ids"], found["offsets"]
        # the immutable proto counts characters, the plain one bytes
        pieces = processor.encode(text, out_type="immutable_proto").pieces
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]

    def _id_of_added(self, found: str) -> int:
        return self._sp.piece_to_id(found if found in self._added else found.strip())

    def _uneven(self, texts: Sequence[str]) -> list[int]:
        """Which texts the library alone would not encode as transformers does."""
        if self._cuts is None and not (self._spaces is Spaces.NONE and self._drops_spaces):
            return []
        return [
            number
            for number, text in enumerate(texts)
            if self._would_lose_space(text) or (self._cuts is not None and self._cuts.search(text))
        ]

    def _would_lose_space(self, text: str) -> bool:
        """Where no space is put in front, one of those that are there is kept, by models too that drop them."""
        return self._spaces is Spaces.NONE and text.startswith((" ", _SPACE)) and self._drops_spaces

    def encode_parts(self, rows: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer.

        Asking the library for offsets triples the time of encoding. But where a model leaves the text as it is, the
        pieces tile it, and offsets are the running sum of the pieces' lengths; where it normalizes the text, or the
        lengths don't add up (an unknown character), the library is asked.
        """
        if rows and self._tiles_text:
            parts = self._parts_by_lengths(rows)
            if parts is not None:
                return parts
            if len(rows) > 1:  # row by row: only those that need it take the slow way
                each = [self.encode_parts([row]) for row in rows]
                return tuple(np.concatenate(arrays) for arrays in zip(*each, strict=True))
        return super().encode_parts(rows)

    def _parts_by_lengths(self, rows: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray] | None:
        """All rows at once; None if in one of them the lengths don't add up."""
        if not all(row and row[0] for row in rows):
            return None
        arrays = self.encode_arrays(["".join(parts) for parts in rows])
        ids = np.concatenate(arrays)
        token_ends = np.cumsum(self._piece_lengths[ids])
        lengths = np.array([_utf8_length(part) for row in rows for part in row])
        next_rows = np.cumsum([len(row) for row in rows])
        lengths[np.append(0, next_rows[:-1])] += self._prefix_length
        part_ends = np.cumsum(lengths)
        row_ends = token_ends[np.cumsum([len(array) for array in arrays]) - 1]
        if not np.array_equal(row_ends, part_ends[next_rows - 1]):
            return None
        before = np.searchsorted(token_ends, part_ends, side="right")
        return ids, np.diff(before, prepend=0)

    def id_to_piece(self, token: int) -> str:
        """See Tokenizer."""
        self._check_ids([token])
        return self._sp.id_to_piece(int(token))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """See Tokenizer."""
        self._check_ids(ids)
        stream = SentencePieceStream(self, skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    @cached_property
    def special_tokens(self) -> list[SpecialToken]:
        """See Tokenizer. Control pieces; the unknown piece is none: no template writes it."""
        controls = [token for token in range(self.vocab_size) if self._sp.is_control(token)]
        return [self._special_token(self._sp.id_to_piece(token), token) for token in controls]

    def _special_token(self, text: str, token: int) -> SpecialToken:
        added = self._added.get(text)
        if added is None:
            return SpecialToken(text, (token,))
        return SpecialToken(text, (token,), added.takes_space_before, added.takes_space_behind)

    @cached_property
    def inner(self) -> Tokenizer:
        """See Tokenizer. Where the folder says `legacy`: false the first text alone gets a space in front."""
        if self._spaces is not Spaces.FIRST:
            return self
        return SentencePieceTokenizer(self.path, self._content, is_behind=True)

    def stream(self) -> SentencePieceStream:
        """See Tokenizer."""
        return SentencePieceStream(self)

    @cached_property
    def _piece_lengths(self) -> np.ndarray:
        """Bytes of text that each piece stands for, int64 [vocab]; of the unknown piece that is not known."""
        lengths = np.array([len(self._bytes_of(token)) for token in range(self.vocab_size)], np.int64)
        lengths[self.unk_id] = 1 << 32  # no sum with it in it is right
        return lengths

    @cached_property
    def _prefix_length(self) -> int:
        """1 if encoding puts a space before a text, else 0."""
        return int(self._sp.id_to_piece(self._sp.encode("a")[0]).startswith(_SPACE))

    @cached_property
    def _tiles_text(self) -> bool:
        return leaves_text_alone(self._content)

    @cached_property
    def _drops_spaces(self) -> bool:
        """Whether the model drops spaces at the ends of a text."""
        return self._sp.encode("a ") == self._sp.encode("a")

    @cached_property
    def _keeping_one_space(self) -> sentencepiece.SentencePieceProcessor:
        """The model that drops the spaces in front and puts one there."""
        return open_model(self.path, with_space_in_front(self._content, True))

    def _bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes of a piece; control pieces have none, the unknown piece has the library's ' ⁇ '."""
        if self._sp.is_control(token):
            return b""
        if self._sp.is_unknown(token):
            return self._sp.decode([token]).encode()
        piece = self._sp.id_to_piece(token)
        if self._sp.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        return piece.replace(_SPACE, " ").encode()

    @cached_property
    def _leading_spaces_dropped(self) -> int:
        """How many spaces decoding takes from the front: 0, the 1 that encoding put there, or all (-1)."""
        if self._sp.decode([_SPACE, _SPACE + "a"]) == "a":
            return -1
        return 1 if self._sp.decode([_SPACE + "a"]) == "a" else 0


class SentencePieceStream:
    """See TextStream. The pieces' bytes through an incremental UTF-8 decoder, less the space in front."""

    def __init__(self, tokenizer: SentencePieceTokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spaces_to_drop = tokenizer._leading_spaces_dropped

    def push(self, token: int) -> str:
        """See TextStream."""
        tokenizer = self._tokenizer
        tokenizer._check_ids([token])
        if not self._skip_special and tokenizer._sp.is_control(int(token)):
            return self._utf8.decode(b"", final=True) + tokenizer.id_to_piece(token)
        return self._drop_spaces(self._utf8.decode(tokenizer._bytes_of(int(token))))

    def flush(self) -> str:
        """See TextStream."""
        return self._utf8.decode(b"", final=True)

    def _drop_spaces(self, text: str) -> str:
        if not text or not self._spaces_to_drop:
            return text
        if self._spaces_to_drop < 0:
            text = text.lstrip(" ")
            self._spaces_to_drop = 0 if text else -1
            return text
        self._spaces_to_drop = 0
        return text.removeprefix(" ")


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
