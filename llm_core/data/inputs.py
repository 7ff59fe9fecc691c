"""Reading a user's data files, with every way in which they can be wrong said in one line."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

from llm_core.disk import sha256
from llm_core.errors import EnvironmentFault, UserError


def find_inputs(pattern: str) -> list[Path]:
    """Files that match `pattern` (a path or a glob; ** allowed), sorted. UserError if there is none."""
    if not pattern:
        raise UserError("--input_glob is empty: give a file or a pattern such as 'data/*.tokens'")
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


def read_json_rows(path: Path) -> list[Any]:
    """A JSON file that is a list of rows. UserError if it is anything else, or an empty list."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a JSON list of rows, and is a {type(rows).__name__}")
    if not rows:
        raise UserError(f"{path}: the list has no rows")
    return rows


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
