"""Plain text in WikiText's form -> one long run of token ids.

A paragraph is what blank lines separate. Titles (paragraphs that start with "=") are left out; every other one
becomes bos + ids + eos. Records are cut from the run, across chunks and files.
"""

from __future__ import annotations

import codecs
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_core.data.chunks import Chunk, Encoded
from llm_core.data.inputs import decode_utf8 as check_utf8
from llm_core.data.wikitext import clean_wikitext
from llm_core.errors import UserError
from llm_core.text import Tokenizer

_CHUNK_BYTES = 1 << 19
_BLANK_LINE_IN_BYTES = re.compile(rb"\n[ \t\r]*\n")
_BLANK_LINES = re.compile(r"\n\s*\n")

def paragraphs_of(text: bytes) -> tuple[list[str], int]:
    """Cleaned paragraphs of a UTF-8 text, and the number of titles left out."""
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    parts = _BLANK_LINES.split(clean_wikitext(text).decode())
    blocks = [block for part in parts if (block := part.strip())]
    kept = [block for block in blocks if not block.startswith("=")]
    return kept, len(blocks) - len(kept)


@dataclass(frozen=True)
class EncodeWiki:
    """Chunk -> {"ids": int32 [tokens]}. Counts: paragraphs, dropped_titles."""

    def __call__(self, tokenizer: Tokenizer, payload: tuple[str, int, int]) -> Encoded:
        path, start, end = payload
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read(end - start)
        if len(content) != end - start:
            raise UserError(f"{path}: the file became shorter while it was read; start again")
        check_utf8(Path(path), content, start)
        paragraphs, titles = paragraphs_of(content.removeprefix(codecs.BOM_UTF8) if start == 0 else content)
        ids = _with_marks(tokenizer, tokenizer.encode_arrays(paragraphs))
        return Encoded({"ids": ids}, {"paragraphs": len(paragraphs), "dropped_titles": titles})


def _with_marks(tokenizer: Tokenizer, paragraphs: list[np.ndarray]) -> np.ndarray:
    """bos + ids + eos of every paragraph in one run."""
    bos, eos = np.array(tokenizer.start_ids, np.int32), np.array(tokenizer.end_ids, np.int32)
    run = [np.zeros(0, np.int32)]
    for ids in paragraphs:
        run += (bos, ids, eos)
    return np.concatenate(run)


class WikiText:
    """Files in WikiText's form -> records {"input_ids": seq_length + 1} that continue each other.

    The ids of all files are one run; what does not fill the last record is dropped and counted.
    """

    kind = "wiki"
    unit = "B"

    def __init__(self, inputs: Sequence[Path], seq_length: int) -> None:
        self.inputs = inputs
        self.arguments = {"seq_length": seq_length}
        self.width = seq_length + 1
        self.columns = {"input_ids": self.width}
        self.encoder = EncodeWiki()
        self._tail = np.zeros(0, np.int32)

    def chunks(self) -> list[Chunk]:
        """See DataSet. Parts of about half a MiB that end at a blank line; the payload is (path, first byte, end)."""
        chunks = []
        for path in self.inputs:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                chunks += [Chunk((str(path), start, end), end - start) for start, end in _parts(content)]
        return chunks

    def rows(self, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See DataSet. The records that became whole with this chunk."""
        run = np.concatenate([self._tail, arrays["ids"]])
        whole = len(run) // self.width * self.width
        self._tail = run[whole:]
        return {"input_ids": run[:whole].reshape(-1, self.width)}

    def counts(self, encoded: dict[str, int], records: int) -> dict[str, int]:
        """See DataSet."""
        return {
            "tokens": records * self.width,
            "supervised_tokens": records * (self.width - 1),
            "dropped_tail_tokens": len(self._tail),
            "paragraphs": encoded["paragraphs"],
            "dropped_titles": encoded["dropped_titles"],
        }

    def side_files(self) -> dict[str, bytes]:
        """See DataSet."""
        return {}


def _parts(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(content):
        border = _BLANK_LINE_IN_BYTES.search(content, start + _CHUNK_BYTES)
        end = border.end() if border else len(content)
        yield start, end
        start = end
