"""MMLU and CMMLU: CSV files of questions with four choices, a file a subject."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from llm_core.data.inputs import decode_utf8, read_bytes
from llm_core.errors import UserError

LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", *(letter.lower() for letter in LETTERS), "answer")
_PART = re.compile(r"_(dev|val|test)$")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question. choices: of A, B, C and D. answer: the right letter. place: "FILE:LINE", for messages."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str
    place: str


def read_choice_folder(folder: Path) -> dict[str, list[ChoiceQuestion]]:
    """The questions of all CSV files in `folder`, by subject. UserError for two files of one subject."""
    by_subject: dict[str, Path] = {}
    for file in choice_files(folder):
        other = by_subject.setdefault(subject_of(file), file)
        if other is not file:
            raise UserError(
                f"{file}: of the same subject as {other.name}; put the files into folders dev/, val/ and test/, one of "
                "a subject in each"
            )
    return {subject: read_choice_file(file) for subject, file in by_subject.items()}


def choice_files(folder: Path) -> list[Path]:
    """The CSV files in `folder`. UserError if there is none."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise UserError(
            f"{folder}: no .csv file there; give the folder of MMLU's or CMMLU's files, or the one that holds dev/, "
            "val/ and test/"
        )
    return files


def subject_of(file: Path) -> str:
    """ "anatomy" of anatomy_dev.csv (MMLU) and of anatomy.csv (CMMLU)."""
    return _PART.sub("", file.stem)


def read_choice_file(path: Path) -> list[ChoiceQuestion]:
    """The questions of one file: with a header (CMMLU), or six columns without one (MMLU).

    UserError with file and line for a missing column, an empty question, or an answer that is none of A to D.
    """
    text = decode_utf8(path, read_bytes(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1  # a quoted cell may hold several lines
    except csv.Error as error:
        raise UserError(f"{path}:{line}: no CSV: {error}") from None
    if not rows:
        raise UserError(f"{path}: nothing but empty cells; give a file with a question a row")
    columns, rows = _columns(path, rows)
    if not rows:
        raise UserError(f"{path}: a header and no question")
    return [_question(path, line, cells, columns) for line, cells in rows]


def _columns(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[list[int] | None, list[tuple[int, list[str]]]]:
    """Where the columns are that the header names, None where there is no header; and the rows below it."""
    line, first = rows[0]
    names = [cell.strip().lower() for cell in first]
    if not {"question", "answer"} & set(names):
        return None, rows
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise UserError(f"{path}:{line}: has no column {', '.join(missing)}; the header is {','.join(first)}")
    return [names.index(name) for name in _COLUMNS], rows[1:]


def _question(path: Path, line: int, cells: list[str], columns: list[int] | None) -> ChoiceQuestion:
    place = f"{path}:{line}"
    if columns is None and len(cells) != len(_COLUMNS) or columns is not None and len(cells) <= max(columns):
        raise UserError(f"{place}: {len(cells)} columns; a row holds {', '.join(_COLUMNS)}")
    question, *choices, answer = cells if columns is None else (cells[column] for column in columns)
    if answer.strip() not in LETTERS:
        raise UserError(f"{place}: the answer is {answer!r}, and must be one of {', '.join(LETTERS)}")
    if not question.strip():
        raise UserError(f"{place}: the question is empty")
    return ChoiceQuestion(subject_of(path), question.strip(), tuple(map(str.strip, choices)), answer.strip(), place)
