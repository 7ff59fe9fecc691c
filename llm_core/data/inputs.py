"""Reading a user's data files, with every way in which they can be wrong said in one line."""

from __future__ import annotations

import glob
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_core.disk import sha256
from llm_core.errors import EnvironmentFault, UserError


def find_inputs(pattern: str, flag: str = "--input_glob") -> list[Path]:
    """Files that match `pattern` (a path or a glob; ** allowed), sorted. UserError, naming `flag`, if there is none."""
    if not pattern:
        raise UserError(f"{flag} is empty: give a file or a pattern such as 'data/*.tokens'")
    if Path(pattern).is_file():  # also a name with [ or * in it
        return [Path(pattern)]
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if found:
        return found
    if Path(pattern).is_dir():
        raise UserError(f"{pattern}: is a folder; give its files, such as '{Path(pattern) / '*'}'")
    raise UserError(f"{pattern}: no file matches; check the path (and quote a pattern, so that it arrives whole)")


def read_bytes(path: Path) -> bytes:
    """The whole file. UserError if it is missing or empty, EnvironmentFault if it cannot be read."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UserError(f"{path}: the file is empty; give one with data")
    return content


def sha256_of(path: Path) -> str:
    """sha256 of the file in hex. UserError if it is missing or empty."""
    try:
        size, digest = path.stat().st_size, sha256(path)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error.strerror}") from error
    if not size:
        raise UserError(f"{path}: the file is empty; give one with data")
    return digest


def decode_utf8(path: Path, content: bytes, first_byte: int = 0) -> str:
    """`content`, which begins at byte `first_byte` of `path`, as text without a byte order mark.

    UserError with the line and the byte of the first that is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig" if first_byte == 0 else "utf-8")
    except UnicodeDecodeError as error:
        place = first_byte + error.start
        with open(path, "rb") as file:
            line = file.read(place).count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x} at offset {place}); save the file as "
            "UTF-8, for example with `iconv -f latin1 -t utf-8`"
        ) from None


def read_json(path: Path) -> Any:
    """A JSON file. UserError with the line if it is malformed, empty or not UTF-8."""
    text = decode_utf8(path, read_bytes(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}: malformed JSON: nested too deep") from None


@dataclass(frozen=True)
class Rows:
    """The rows of a JSON list or of a JSONL file. lines: where each begins, counted from 1."""

    path: Path
    values: list[Any]
    lines: list[int]
    in_list: bool

    def place(self, number: int) -> str:
        """Row `number` (from 0) as messages name it: FILE:LINE, and in a list the row's number as well."""
        return place_of(str(self.path), number, self.lines[number], self.in_list)


def place_of(path: str, number: int, line: int, in_list: bool) -> str:
    """See Rows.place."""
    return f"{path}:{line}: row {number}" if in_list else f"{path}:{line}"


def read_rows(path: Path) -> Rows:
    """A JSON list of rows, or JSONL (a row a line, whatever the file's name). UserError if it is neither, or empty."""
    text = decode_utf8(path, read_bytes(path))
    if text.lstrip()[:1] == "[":
        rows = _rows_of_list(path, text)
    elif _is_json_lines(path, text):
        rows = _rows_of_lines(path, text)
    else:
        raise UserError(f"{path}: must be a JSON list of rows, and is a {type(read_json(path)).__name__}")
    if not rows.values:
        raise UserError(f"{path}: the list has no rows")
    return rows


def _rows_of_list(path: Path, text: str) -> Rows:
    """One row after the other, so that the line of each is known."""
    decode = json.JSONDecoder().raw_decode
    values, lines = [], []
    line, counted = 1, 0
    try:
        position = _skip_space(text, text.index("[") + 1)
        while text[position : position + 1] != "]":
            if values:
                if text[position : position + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position = _skip_space(text, position + 1)
            line, counted = line + text.count("\n", counted, position), position
            value, position = decode(text, position)
            values.append(value)
            lines.append(line)
            position = _skip_space(text, position)
        position = _skip_space(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}: malformed JSON: nested too deep") from None
    return Rows(path, values, lines, in_list=True)


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()


def _is_json_lines(path: Path, text: str) -> bool:
    """Whether the first line that is not blank is JSON by itself; a .jsonl is taken at its word."""
    if path.suffix == ".jsonl":
        return True
    try:
        json.loads(next(line for line in text.split("\n") if line.strip()))
    except (ValueError, RecursionError):
        return False
    return True


def _rows_of_lines(path: Path, text: str) -> Rows:
    values, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            values.append(parse_line(line, f"{path}:{number}"))
            lines.append(number)
    return Rows(path, values, lines, in_list=False)


def parse_line(line: str | bytes, place: str) -> Any:
    """One line of JSONL. UserError naming `place` if it is malformed."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: malformed JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{place}: malformed JSON: nested too deep") from None


def required_text(row: Any, key: str, place: str) -> str:
    """row[key], a string. UserError naming `place` ("FILE: row 3") if the row lacks it or it is no string."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: must be an object with the key {key!r}, and is a {type(row).__name__}")
    if key not in row:
        raise UserError(f"{place}: has no key {key!r} (it has {', '.join(map(repr, row)) or 'none'})")
    if not isinstance(row[key], str):
        raise UserError(f"{place}: {key!r} must be a string, and is a {type(row[key]).__name__}")
    try:
        row[key].encode()
    except UnicodeEncodeError as error:
        half = ascii(row[key][error.start]).strip("'")
        raise UserError(f"{place}: {key!r} has half a character in it ({half} without its pair); remove it") from None
    return row[key]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that has its name only when it is whole. EnvironmentFault if the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be written: {error.strerror}") from error
