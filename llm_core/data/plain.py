"""Plain text -> one long run of token ids, from which records are cut across chunks and files.

A document becomes bos + ids + eos. What a document is depends on the form: in `text` what blank lines separate, as it
stands there; in `jsonl` the "text" of a row. (WikiText's form, which is cleaned first, is in wiki.py.)
"""

from __future__ import annotations

import codecs
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_core.data.chunks import Chunk, Encoded, Encoder
from llm_core.data.inputs import decode_utf8, parse_line, required_text
from llm_core.errors import UserError
from llm_core.text import Tokenizer

_CHUNK_BYTES = 1 << 19
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")

Payload = tuple[str, int, int]  # path, first byte, end


def read_part(payload: Payload) -> bytes:
    """The bytes of a chunk, which are UTF-8, without a byte order mark. UserError if they are not, or not there."""
    path, start, end = payload
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(end - start)
    if len(content) != end - start:
        raise UserError(f"{path}: the file became shorter while it was read; start again")
    decode_utf8(Path(path), content, start)
    return content.removeprefix(codecs.BOM_UTF8) if start == 0 else content


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    """bos + ids + eos of every document in one run, int32."""
    bos, eos = np.array(tokenizer.start_ids, np.int32), np.array(tokenizer.end_ids, np.int32)
    run = [np.zeros(0, np.int32)]
    for ids in tokenizer.encode_arrays(documents):
        run += (bos, ids, eos)
    return np.concatenate(run)


@dataclass(frozen=True)
class EncodeText:
    """Chunk -> {"ids": int32 [tokens]}. Counts: documents."""

    def __call__(self, tokenizer: Tokenizer, payload: Payload) -> Encoded:
        text = read_part(payload).decode().replace("\r\n", "\n")
        documents = [part.rstrip() for part in _BLANK_LINES.split(text) if part.strip()]
        return Encoded({"ids": encode_documents(tokenizer, documents)}, {"documents": len(documents)})


@dataclass(frozen=True)
class EncodeJsonLines:
    """Chunk -> {"ids": int32 [tokens]}. Counts: documents, dropped_empty (rows without a word)."""

    def __call__(self, tokenizer: Tokenizer, payload: Payload) -> Encoded:
        path, start, _ = payload
        documents, empty = [], 0
        for number, line in enumerate(read_part(payload).split(b"\n")):
            if not line.strip():
                continue
            try:
                text = required_text(parse_line(line, ""), "text", "")
            except UserError as error:  # the line's number is looked for only when it is wanted
                raise UserError(f"{path}:{_lines_before(path, start) + number + 1}{error}") from None
            if text.strip():
                documents.append(text)
            else:
                empty += 1
        counts = {"documents": len(documents), "dropped_empty": empty}
        return Encoded({"ids": encode_documents(tokenizer, documents)}, counts)


def _lines_before(path: str, first_byte: int) -> int:
    with open(path, "rb") as file:
        return file.read(first_byte).count(b"\n")


class PlainText:
    """Files of text -> records {"input_ids": seq_length + 1} that continue each other.

    The ids of all files are one run; what does not fill the last record is dropped and counted. `kind` is text or
    jsonl.
    """

    unit = "B"
    encoder: Encoder
    border = re.compile(rb"\n[ \t\r]*\n")  # after which a chunk may end

    def __init__(self, inputs: Sequence[Path], seq_length: int, kind: str = "text") -> None:
        self.inputs = inputs
        self.kind = kind
        self.arguments = {"seq_length": seq_length}
        self.width = seq_length + 1
        self.columns = {"input_ids": self.width}
        self.encoder = EncodeText()
        if kind == "jsonl":
            self.encoder, self.border = EncodeJsonLines(), re.compile(rb"\n")
        self._tail = np.zeros(0, np.int32)

    def chunks(self) -> list[Chunk]:
        """See DataSet. Parts of about half a MiB that end at a border; the payload is (path, first byte, end)."""
        chunks = []
        for path in self.inputs:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if self.kind == "jsonl" and content[:_CHUNK_BYTES].lstrip()[:1] == b"[":
                    raise UserError(f"{path}: a JSON list; give a row a line (JSONL), as `jq -c '.[]'` writes them")
                chunks += [Chunk((str(path), start, end), end - start) for start, end in self._parts(content)]
        return chunks

    def _parts(self, content: mmap.mmap) -> Iterator[tuple[int, int]]:
        start = 0
        while start < len(content):
            border = self.border.search(content, start + _CHUNK_BYTES)
            end = border.end() if border else len(content)
            yield start, end
            start = end

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
            **encoded,
        }

    def side_files(self) -> dict[str, bytes]:
        """See DataSet."""
        return {}
