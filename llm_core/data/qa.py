"""Conversations (ShareGPT form) -> rows of input_ids and labels through a fastchat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.data.chunks import Chunk, Encoded
from llm_core.data.conversations import rounds_of
from llm_core.data.inputs import read_json_rows
from llm_core.data.segments import Samples, cut_and_count, encode_samples, to_rows
from llm_core.text import Tokenizer
from llm_core.text.templates import conversation_template, render_rounds

_ROWS_PER_CHUNK = 500


@dataclass(frozen=True)
class EncodeQa:
    """Chunk -> the arrays of Samples, at most seq_length + 1 long. Counts: cut_and_count's, samples, dropped_turns.

    They are padded by the parent: rows of padding would be most of what goes through the disk.
    """

    seq_length: int
    template: str = "vicuna_v1.1"

    def __call__(self, tokenizer: Tokenizer, payload: tuple[str, int, list[Any]]) -> Encoded:
        path, first, rows = payload
        conversation = conversation_template(self.template)
        samples, dropped_turns = [], 0
        for number, row in enumerate(rows, first):
            rounds, left_out = rounds_of(row, f"{path}: row {number}")
            samples.append(render_rounds(conversation, rounds))
            dropped_turns += left_out
        remaining, counts = cut_and_count(encode_samples(tokenizer, samples), self.seq_length + 1)
        return Encoded(asdict(remaining), {"samples": len(samples), "dropped_turns": dropped_turns, **counts})


class Conversations:
    """JSON files of conversations -> records {"input_ids", "labels": seq_length + 1}."""

    kind = "qa"
    unit = "samples"

    def __init__(self, inputs: Sequence[Path], seq_length: int) -> None:
        self.inputs = inputs
        self.encoder = EncodeQa(seq_length)
        self.arguments = {"seq_length": seq_length, "template": self.encoder.template}
        self.columns = {"input_ids": seq_length + 1, "labels": seq_length + 1}

    def chunks(self) -> list[Chunk]:
        """See DataSet. Some hundred rows; the payload is (path, number of the first row, rows)."""
        chunks = []
        for path in self.inputs:
            rows = read_json_rows(path)
            for first in range(0, len(rows), _ROWS_PER_CHUNK):
                part = rows[first : first + _ROWS_PER_CHUNK]
                chunks.append(Chunk((str(path), first, part), len(part)))
        return chunks

    def rows(self, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See DataSet."""
        return to_rows(Samples(**arrays), self.columns["input_ids"], self.pad_id)

    def counts(self, encoded: dict[str, int], records: int) -> dict[str, int]:
        """See DataSet."""
        return encoded

    def side_files(self) -> dict[str, bytes]:
        """See DataSet."""
        return {}
