"""MRPC -> records of a sentence-pair classifier: the text of a pair, and whether its sentences mean the same.

A record holds max_seq_len + 1 ids. Its one label, 0 or 1, stands at the place right behind the text's last token, all
others are -100: moved by one, as every record is, the label meets that token, where `SequenceClassifier` reads. So no
reader has to find the text's end by the pad id, which is the wrong way where padding and the end of a text share one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.data.batch import IGNORED
from llm_core.data.chunks import Chunk, Encoded
from llm_core.data.inputs import decode_utf8, read_bytes
from llm_core.errors import UserError
from llm_core.text import Tokenizer

_PAIRS_PER_CHUNK = 1000
# What the columns are called: in MSR's files and GLUE's tsv, in GLUE's jsonl, and in another common jsonl
_NAMES = {
    "label": ("Quality", "label"),
    "first": ("#1 String", "sentence1", "text1"),
    "second": ("#2 String", "sentence2", "text2"),
}


@dataclass(frozen=True)
class Pair:
    """Two sentences. label: 1 if they mean the same, else 0."""

    first: str
    second: str
    label: int


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of MSR's msr_paraphrase_*.txt, of GLUE's tsv, or of a .jsonl with sentence1, sentence2 and label.

    In the first two, columns are separated by tabs and a quotation mark is a character like any other: a reader of CSV
    that pairs them up joins lines. A byte order mark is skipped. UserError with the line for anything else.
    """
    text = decode_utf8(path, read_bytes(path))
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    rows = _json_rows(path, lines) if lines[0][1].startswith("{") else _tab_rows(path, lines)
    if not rows:
        raise UserError(f"{path}: a header and no pair")
    return [_pair(row, f"{path}:{number}") for number, row in rows]


def _json_rows(path: Path, lines: list[tuple[int, str]]) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: malformed JSON: {error.msg} (column {error.colno})") from None
        rows.append((number, _named(row, f"{path}:{number}") if isinstance(row, dict) else {}))
    return rows


def _tab_rows(path: Path, lines: list[tuple[int, str]]) -> list[tuple[int, dict[str, Any]]]:
    header = lines[0][1].split("\t")
    rows = []
    for number, line in lines[1:]:
        cells = line.split("\t")
        if len(cells) != len(header):
            raise UserError(f"{path}:{number}: {len(cells)} columns, and the header has {len(header)}")
        rows.append((number, _named(dict(zip(header, cells, strict=True)), f"{path}:{lines[0][0]}")))
    return rows


def _named(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The three values of a row under our names."""
    found = {}
    for name, theirs in _NAMES.items():
        key = next((key for key in theirs if key in row), None)
        if key is None:
            wanted = " or ".join(map(repr, theirs))
            raise UserError(f"{place}: has no column {wanted} (it has {', '.join(map(repr, row)) or 'none'})")
        found[name] = row[key]
    return found


def _pair(row: dict[str, Any], place: str) -> Pair:
    first, second = (row.get(name) for name in ("first", "second"))
    if not (isinstance(first, str) and first.strip() and isinstance(second, str) and second.strip()):
        raise UserError(f"{place}: a sentence is empty, or no text")
    if str(row["label"]) not in ("0", "1"):
        raise UserError(
            f"{place}: the label is {row['label']!r}, and must be 0 or 1 (GLUE's test set keeps its answers back: use "
            "MSR's msr_paraphrase_test.txt)"
        )
    return Pair(first.strip(), second.strip(), int(row["label"]))


def split_pairs(pairs: Sequence[Pair], shares: dict[str, float], seed: int) -> dict[str, list[Pair]]:
    """Parts of the pairs, drawn with `seed`: by name a share of them each, and "train" the rest, all in file order.

    UserError if a share, or the rest, has not one pair.
    """
    order = np.argsort(np.random.Philox(seed).random_raw(len(pairs)), kind="stable")  # the same in every numpy
    parts, taken = {}, 0
    for name, share in shares.items():
        count = round(share * len(pairs))
        parts[name] = order[taken : taken + count]
        taken += count
    parts = {"train": order[taken:], **{name: part for name, part in parts.items() if shares[name] > 0}}
    for name, part in parts.items():
        if not len(part):
            raise UserError(f"{len(pairs)} pairs leave none for {name}: change --valid_share and --test_share")
    return {name: [pairs[index] for index in sorted(part)] for name, part in parts.items()}


def pair_text(first: str, second: str) -> tuple[str, str, str]:
    """The text of a pair in three parts, the first two ending with a sentence.

    It ends with words of its own, so that the classifier reads the same token whatever the sentences, and one that is
    never padding.
    """
    return f"Sentence 1: {first}", f"\nSentence 2: {second}", "\nParaphrase:"


@dataclass(frozen=True)
class EncodePairs:
    """Chunk -> input_ids and labels int32 [pairs, max_seq_len + 1]: bos, text, then padding.

    A text that is too long loses tokens at the end of the longer of its sentences, until it fits (cut_samples).
    """

    max_seq_len: int

    def __call__(self, tokenizer: Tokenizer, pairs: list[Pair]) -> Encoded:
        ids, counts = tokenizer.encode_parts([pair_text(pair.first, pair.second) for pair in pairs])
        parts = np.split(ids, np.cumsum(counts)[:-1])
        start = np.array(tokenizer.start_ids, np.int32)
        width = self.max_seq_len + 1
        input_ids = np.full((len(pairs), width), tokenizer.pad_or_substitute_id, np.int32)
        labels = np.full_like(input_ids, IGNORED)
        cut_samples = tokens = 0
        for row, pair in enumerate(pairs):
            first, second, end = parts[3 * row : 3 * row + 3]
            lengths = _fitting(len(first), len(second), self.max_seq_len - len(start) - len(end))
            cut_samples += lengths != (len(first), len(second))
            whole = np.concatenate([start, first[: lengths[0]], second[: lengths[1]], end])
            input_ids[row, : len(whole)] = whole
            labels[row, len(whole)] = pair.label
            tokens += len(whole)
        positive = sum(pair.label for pair in pairs)
        kinds = {"paraphrases": positive, "others": len(pairs) - positive}
        return Encoded(
            {"input_ids": input_ids, "labels": labels}, {"tokens": tokens, **kinds, "cut_samples": cut_samples}
        )


def _fitting(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two sentences that fit into `room` together, taken from the longer one."""
    if first + second <= room:
        return first, second
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


class Mrpc:
    """The pairs as a `preprocess.DataSet`. arguments: more facts for the manifest. UserError for max_seq_len < 32."""

    kind = "classification"
    unit = "pair"
    pad_id = 0  # set by preprocess; the encoder asks the tokenizer itself

    def __init__(self, path: Path, pairs: Sequence[Pair], max_seq_len: int, arguments: dict[str, Any]) -> None:
        if max_seq_len < 32:
            raise UserError(f"--max_seq_len {max_seq_len}: too short for a pair of sentences; 32 is the least")
        self.inputs = [path]
        self.arguments = {"max_seq_len": max_seq_len, "classes": ["different", "paraphrase"], **arguments}
        self.columns = {"input_ids": max_seq_len + 1, "labels": max_seq_len + 1}
        self.encoder: Callable[[Tokenizer, list[Pair]], Encoded] = EncodePairs(max_seq_len)
        self._pairs = list(pairs)

    def chunks(self) -> list[Chunk]:
        """See DataSet. A thousand pairs each."""
        starts = range(0, len(self._pairs), _PAIRS_PER_CHUNK)
        parts = [self._pairs[start : start + _PAIRS_PER_CHUNK] for start in starts]
        return [Chunk(part, len(part)) for part in parts]

    def rows(self, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See DataSet."""
        return arrays

    def counts(self, encoded: dict[str, int], records: int) -> dict[str, int]:
        """See DataSet."""
        return {"pairs": records, **encoded}

    def side_files(self) -> dict[str, bytes]:
        """See DataSet."""
        return {}
