"""Which format a data file has, told from its first row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm_core.data.inputs import decode_utf8
from llm_core.errors import UserError

_FIRST_BYTES = 1 << 16
# The key of a row that no other format has.
_KEYS = {
    "conversations": "sharegpt",
    "messages": "messages",
    "instruction": "alpaca",
    "src": "src_tgt",
    "message_tree_id": "oasst1",
    "message_id": "oasst1",
    "text": "jsonl",
}


def detect_format(path: Path) -> str:
    """A --dataset_type for `path`: a name of conversations.FORMATS, jsonl, or wiki for what is no JSON.

    UserError for JSON of another form, and for tables.
    """
    if path.suffix in (".csv", ".tsv"):
        raise UserError(
            f"{path}: a table; mmlu_csv2json.py reads MMLU's and CMMLU's, mrpc_process.py pairs of sentences. To take "
            "it as plain text give --dataset_type text"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(_FIRST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] not in (b"{", b"["):
        return "wiki"
    row = _first_row(path, head)
    if not isinstance(row, dict):
        return "wiki"  # "[1] A note" or "{" begins a text as well
    for key, kind in _KEYS.items():
        if key in row:
            return kind
    advice = "it looks like SQuAD: use squad_data_process.py" if "data" in row else "give --dataset_type"
    keys = ", ".join(map(repr, row)) or "none"
    raise UserError(f"{path}: its rows have the keys {keys}, by which no format is known; {advice}")


def _first_row(path: Path, head: bytes) -> Any:
    """The first row of a JSON list or of JSONL; None if there is none."""
    text = decode_utf8(path, head[: head.rfind(b"\n") + 1] if len(head) == _FIRST_BYTES else head).lstrip()
    if text.startswith("["):
        text = text[1:].lstrip()
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        pass
    try:  # longer than the head
        whole = decode_utf8(path, path.read_bytes()).lstrip()
        return json.JSONDecoder().raw_decode(whole[1:].lstrip() if whole.startswith("[") else whole)[0]
    except (ValueError, RecursionError):
        return None


def detect_one_format(paths: list[Path]) -> str:
    """The format that all of `paths` have. UserError that names two files which differ."""
    kinds = {path: detect_format(path) for path in paths}
    first = paths[0]
    for path, kind in kinds.items():
        if kind != kinds[first]:
            raise UserError(f"{first} looks like {kinds[first]}, and {path} like {kind}: give --dataset_type")
    return kinds[first]
