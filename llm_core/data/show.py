"""`run_llm.py show-data FILE`: records as text, with the tokens that are learnt marked.

The text is coloured on a terminal (green: learnt, that is, counted in the loss; dim: only read); elsewhere, and
with NO_COLOR, learnt text stands in [[double brackets]].
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.data.batch import IGNORED, Batch, shift
from llm_core.data.records import RecordFile
from llm_core.errors import UserError
from llm_core.report.console import console, has_colour, paint
from llm_core.text import Tokenizer, load_tokenizer

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLLAPSED_RUN = 4  # so many equal special tokens in a row, or more, are shown as one with a count


def main(argv: Sequence[str]) -> int:
    """Print records; argv without the verb. Returns the exit code."""
    args = _parse(argv)
    records = RecordFile(args.file)
    if not 0 <= args.start < records.num_records:
        raise UserError(
            f"--start {args.start}: {args.file} has records 0 to {records.num_records - 1}. Choose one of them."
        )
    tokenizer = _tokenizer(records, args.tokenizer)
    for line in summary(records):
        console.result(line)
    console.result(legend())
    numbers = np.arange(args.start, min(args.start + args.n, records.num_records))
    shown = as_batch(records, numbers)
    learnt = learnt_tokens(shown, pad_token_id=-1)
    for row, number in enumerate(numbers):
        console.result(f"\n--- record {number}: {learnt[row].sum()} of {learnt.shape[1]} tokens learnt")
        console.result(as_text(shown.input_ids[row], learnt[row], tokenizer))
        if args.ids:
            console.result("\n" + as_pieces(shown.input_ids[row], learnt[row], tokenizer))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_llm.py show-data", description="Print records decoded, with the learnt tokens marked."
    )
    parser.add_argument("file", type=Path, help="a MindRecord, or a folder of them")
    parser.add_argument("--tokenizer", help="tokenizer file, folder or name (default: the one in the data's manifest)")
    parser.add_argument("-n", type=int, default=3, help="how many records (default 3)")
    parser.add_argument("--start", type=int, default=0, help="number of the first (default 0)")
    parser.add_argument("--ids", action="store_true", help="also print every token with its id")
    return parser.parse_args(argv)


def _tokenizer(records: RecordFile, given: str | None) -> Tokenizer:
    """The tokenizer given, else the one that the manifest names; warns where the data was made with another."""
    facts = tokenizer_facts(records)
    if given is None:
        given = facts.get("path") or facts.get("file")
        if given is None:
            raise UserError(f"{records.path}: no manifest beside it names its tokenizer. Give --tokenizer PATH.")
        if not Path(given).is_file():
            raise UserError(f"{given}: the tokenizer of {records.path} is not there. Give --tokenizer PATH.")
    tokenizer = load_tokenizer(given)
    if facts.get("sha256", tokenizer.fingerprint) != tokenizer.fingerprint:
        console.warn(
            f"{records.path}: made with another tokenizer than {tokenizer.path} (its sha256 differs): the text "
            "below may be wrong"
        )
    return tokenizer


def tokenizer_facts(records: RecordFile) -> dict[str, Any]:
    """What the manifest says of the tokenizer (file, path, sha256, vocab_size ...); {} if there is none."""
    return next((m["tokenizer"] for m in records.manifests.values() if "tokenizer" in m), {})


def summary(records: RecordFile) -> Iterator[str]:
    """Lines on the data set as a whole: what it holds, and what its manifests say."""
    columns = ", ".join(f"{name} [{width}]" for name, width in records.columns.items())
    yield f"{records.path}: {records.num_records} records of {columns} in {len(records.files)} file(s)"
    if not records.manifests:
        yield "no manifest (not written by this program): hashes unknown"
    for path, manifest in records.manifests.items():
        own = {"format", "files", "columns", "records"}
        facts = [f"  {key}: {_plain(value)}" for key, value in manifest.items() if key not in own and value]
        yield "\n".join([f"{path.name}:", *facts])


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(map(_plain, value))
    return str(value)


def legend() -> str:
    """How `as_text` marks tokens on this terminal."""
    if has_colour(sys.stdout):
        return f"{paint('learnt (counted in the loss)', 'green')}, {paint('only read', 'dim')}"
    return "[[learnt (counted in the loss)]], only read"


def as_batch(records: RecordFile, numbers: np.ndarray) -> Batch:
    """Records by number as one batch, whatever their length."""
    rows = records.read(numbers)
    if "input_ids" not in rows:
        raise UserError(f"{records.path}: has no column input_ids, only {', '.join(records.columns)}.")
    return Batch(rows["input_ids"], rows.get("labels"), numbers)


def learnt_tokens(batch: Batch, pad_token_id: int) -> np.ndarray:
    """bool [B, S+1]: the tokens that are targets of the loss. The first of a row never is."""
    _, labels = shift(batch, pad_token_id)
    return np.pad(labels != IGNORED, ((0, 0), (1, 0)))


def as_text(ids: np.ndarray, learnt: np.ndarray, tokenizer: Tokenizer) -> str:
    """One record (ids int [n], learnt bool [n]) as text, learnt text marked. Special tokens are spelled;
    <123?> is an id that the tokenizer does not have."""
    runs = []
    for mark, pieces in groupby(_decoded(ids, learnt, tokenizer), key=lambda piece: piece[1]):
        text = "".join(text for text, _ in pieces)
        if text:
            runs.append(_marked(text, mark))
    return "".join(runs)


def as_pieces(ids: np.ndarray, learnt: np.ndarray, tokenizer: Tokenizer) -> str:
    """One record as `id:piece` for every token, as the vocabulary spells it, learnt tokens marked."""
    return " ".join(
        _marked(f"{token}:{_visible(_piece(token, tokenizer))}", bool(mark))
        for token, mark in zip(ids.tolist(), learnt.tolist(), strict=True)
    )


def _decoded(ids: np.ndarray, learnt: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """(text, learnt) for every token. A character of several tokens comes with the last of them."""
    special = {i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) if i >= 0}
    stream = tokenizer.stream()
    last = False
    for (token, mark), run in groupby(zip(ids.tolist(), learnt.tolist(), strict=True)):
        count = sum(1 for _ in run)
        if token in special or not 0 <= token < tokenizer.vocab_size:
            yield _visible(stream.flush()), last
            stream = tokenizer.stream()
            name = _piece(token, tokenizer)
            yield (f"{name}x{count}" if count >= _COLLAPSED_RUN else name * count), mark
        else:
            for _ in range(count):
                yield _visible(stream.push(token)), mark
        last = mark
    yield _visible(stream.flush()), last


def _piece(token: int, tokenizer: Tokenizer) -> str:
    if not 0 <= token < tokenizer.vocab_size:
        return f"<{token}?>"
    return tokenizer.id_to_piece(token)


def _visible(text: str) -> str:
    """Control characters (a terminal would obey them) written out."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _marked(text: str, learnt: bool) -> str:
    if has_colour(sys.stdout):
        return paint(text, "green" if learnt else "dim")
    return f"[[{text}]]" if learnt else text
