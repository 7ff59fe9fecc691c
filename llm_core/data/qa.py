"""Conversations -> rows of input_ids and labels, written by a chat format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.data.chunks import Chunk, Encoded
from llm_core.data.conversations import FORMATS, read_conversations
from llm_core.data.inputs import Rows, place_of
from llm_core.data.segments import Samples, Segment, cut_and_count, encode_samples, to_rows
from llm_core.errors import UserError
from llm_core.report.console import console
from llm_core.text import Tokenizer
from llm_core.text.chat import TOKENIZER, ChatFormat, Message, chat_format, template_path
from llm_core.text.jinja import template_file
from llm_core.text.lookup import find_tokenizer_file

_ROWS_PER_CHUNK = 500


@dataclass(frozen=True)
class EncodeQa:
    """Chunk -> the arrays of Samples, at most seq_length + 1 long, and `empty`: its rows with an empty turn.

    kind: of conversations.FORMATS. template: a name for `chat_format`. drop_long: what is longer is left out, not cut.
    Counts: cut_and_count's, samples, dropped_turns, dropped_empty_turns (rows left out for one).
    They are padded by the parent: rows of padding would be most of what goes through the disk.
    """

    seq_length: int
    template: str = "vicuna_v1.1"
    kind: str = "sharegpt"
    drop_long: bool = False

    def __call__(self, tokenizer: Tokenizer, payload: tuple[str, int, list[int], bool, list[Any]]) -> Encoded:
        path, first, lines, in_list, rows = payload
        written_by, conversation_of = chat_format(self.template, tokenizer), FORMATS[self.kind]
        samples, empty, dropped_turns = [], [], 0
        for number, (line, row) in enumerate(zip(lines, rows, strict=True), first):
            place = place_of(path, number, line, in_list)
            conversation = conversation_of(row, place)
            dropped_turns += conversation.left_out
            if conversation.has_empty_turn:
                empty.append(number - first)
            else:
                samples.append(_sample(written_by, conversation.messages, place))
        remaining, counts = cut_and_count(encode_samples(tokenizer, samples), self.seq_length + 1, self.drop_long)
        counts |= {"dropped_turns": dropped_turns, "dropped_empty_turns": len(empty)}
        arrays = {**asdict(remaining), "empty": np.array(empty, np.int64)}
        return Encoded(arrays, {"samples": len(rows), **counts})


def _sample(written_by: ChatFormat, messages: Sequence[Message], place: str) -> list[Segment]:
    if not messages:
        return []
    try:
        rounds = written_by.rounds(messages)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    segments: list[Segment] = []
    for prompt, answer in rounds:
        segments += [(part, False) for part in prompt]
        segments += [(part, True) for part in answer]
    return segments


def located_template(template: str, tokenizer: str | Path) -> str:
    """`template`, or for "tokenizer" the folder of `tokenizer`, so that its file counts among the inputs."""
    return str(find_tokenizer_file(tokenizer).parent.resolve()) if template == TOKENIZER else template


class Conversations:
    """Files of conversations -> records {"input_ids", "labels": seq_length + 1}. Arguments: see EncodeQa.

    A template that is a file counts among the inputs: the records depend on it.
    """

    unit = "samples"

    def __init__(
        self,
        inputs: Sequence[Path],
        seq_length: int,
        template: str = "vicuna_v1.1",
        kind: str = "sharegpt",
        drop_long: bool = False,
    ) -> None:
        self._files = list(inputs)
        path = template_path(template)
        self.inputs = [*inputs, *([] if path is None else [template_file(path)])]
        self.kind = "qa" if kind == "sharegpt" else f"qa {kind}"
        self.encoder = EncodeQa(seq_length, template, kind, drop_long)
        self.arguments = {"seq_length": seq_length, "template": template, "long_rows": "drop" if drop_long else "cut"}
        self.columns = {"input_ids": seq_length + 1, "labels": seq_length + 1}
        self._chunk_rows: list[tuple[Rows, int]] = []  # of each chunk: its file's rows, and the number of its first
        self._empty_turn_named = False

    def chunks(self) -> list[Chunk]:
        """See DataSet. Some hundred rows; the payload is (path, number of the first, lines, in a list?, rows)."""
        chunks, self._chunk_rows = [], []
        for path in self._files:
            rows = read_conversations(path, self.encoder.kind)
            for first in range(0, len(rows.values), _ROWS_PER_CHUNK):
                part = slice(first, first + _ROWS_PER_CHUNK)
                payload = (str(path), first, rows.lines[part], rows.in_list, rows.values[part])
                chunks.append(Chunk(payload, len(rows.values[part])))
                self._chunk_rows.append((rows, first))
        return chunks

    def rows(self, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See DataSet. Names the first row with an empty turn; the counts have the others."""
        empty = arrays.pop("empty")
        if len(empty) and not self._empty_turn_named:
            rows, first = self._chunk_rows[number]
            console.warn(f"{rows.place(first + int(empty[0]))}: has an empty turn; such rows are left out and counted")
            self._empty_turn_named = True
        return to_rows(Samples(**arrays), self.columns["input_ids"], self.pad_id)

    def counts(self, encoded: dict[str, int], records: int) -> dict[str, int]:
        """See DataSet."""
        return encoded

    def side_files(self) -> dict[str, bytes]:
        """See DataSet."""
        return {}
