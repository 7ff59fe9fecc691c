"""Plain text in WikiText's form -> one long run of token ids.

A paragraph is what blank lines separate. Titles (paragraphs that start with "=") are left out; every other one
becomes bos + ids + eos. Records are cut from the run, across chunks and files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_core.data.chunks import Encoded
from llm_core.data.plain import Payload, PlainText, encode_documents, read_part
from llm_core.data.wikitext import clean_wikitext
from llm_core.text import Tokenizer

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

    def __call__(self, tokenizer: Tokenizer, payload: Payload) -> Encoded:
        paragraphs, titles = paragraphs_of(read_part(payload))
        counts = {"paragraphs": len(paragraphs), "dropped_titles": titles}
        return Encoded({"ids": encode_documents(tokenizer, paragraphs)}, counts)


class WikiText(PlainText):
    """Files in WikiText's form -> records {"input_ids": seq_length + 1}, as PlainText cuts them."""

    def __init__(self, inputs: Sequence[Path], seq_length: int) -> None:
        super().__init__(inputs, seq_length, kind="wiki")
        self.encoder = EncodeWiki()
