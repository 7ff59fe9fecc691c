"""The prompts of a predict run: words on the command line, or files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llm_core.errors import UserError

FILE_SUFFIXES = (".txt", ".json", ".jsonl")


def read_prompts(values: Sequence[str] | str) -> list[str]:
    """Expand --predict_data: a value that names a file stands for the prompts in it, any other is itself a prompt.

    A .json file holds a list of strings, a .jsonl file one JSON string a line, every other file one prompt a line
    (blank lines are skipped). Raises UserError for a file that is missing, empty, malformed or not UTF-8, with its
    line.
    """
    prompts: list[str] = []
    for value in [values] if isinstance(values, str) else values:
        if _names_a_file(value):
            prompts += _read_file(Path(value))
        else:
            prompts.append(value)
    if not prompts:
        raise UserError('no prompt: give one or more with --predict_data "Once upon a time", or a file of them')
    return prompts


def _names_a_file(value: str) -> bool:
    try:
        if Path(value).is_file():
            return True
    except (OSError, ValueError):  # a long prompt, or one with a zero byte, is no path
        return False
    if value.endswith(FILE_SUFFIXES) and not any(character.isspace() for character in value):
        raise UserError(
            f"--predict_data {value}: no such file (a prompt that looks like a file's name goes into a file)"
        )
    return False


def _read_file(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompts: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        byte = f"0x{raw[error.start]:02x}"
        raise UserError(f"{path}:{line}: not UTF-8 text (byte {byte}); save the file as UTF-8") from None
    if path.suffix == ".json":
        prompts = _strings(_parse_json(text, path, 1), path)
    else:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if path.suffix == ".jsonl":
            prompts = [_string(_parse_json(line, path, number), f"{path}:{number}") for number, line in lines]
        else:
            prompts = [line for _, line in lines]
    if not prompts:
        raise UserError(f"{path}: the file holds no prompt")
    return prompts


def _parse_json(text: str, path: Path, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{first_line + error.lineno - 1}: malformed JSON: {error.msg}") from None


def _strings(value, path: Path) -> list[str]:
    if not isinstance(value, list):
        raise UserError(f"{path}: must hold a list of strings, not {type(value).__name__}")
    return [_string(item, f"{path}: item {number}") for number, item in enumerate(value)]


def _string(value, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: a prompt is a JSON string, not {type(value).__name__}")
    return value
