"""The prompts of a predict run: words on the command line, or files of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_core.data.conversations import alpaca_question
from llm_core.data.inputs import required_text
from llm_core.errors import UserError
from llm_core.text import Tokenizer
from llm_core.text.chat import PLAIN, ChatFormat, chat_format
from llm_core.text.templates import alpaca_prompt

FILE_SUFFIXES = (".txt", ".json", ".jsonl")

Writer = Callable[[str, str], str]  # instruction and input -> the prompt


def read_prompts(values: Sequence[str] | str, format_name: str = PLAIN) -> list[str]:
    """Expand --predict_data: a value that names a file stands for the prompts in it, any other is itself a prompt.

    A .json file holds a list, a .jsonl file an item a line, every other file one prompt a line (blank lines are
    skipped). An item is a string, or a row of Alpaca's {"instruction", "input"}: under a chat format the instruction
    with its input on the next line, under `format_name` none Stanford Alpaca's prompt. Raises UserError for a file that
    is missing, empty, malformed or not UTF-8, with its line.
    """
    prompts: list[str] = []
    for value in [values] if isinstance(values, str) else values:
        if _names_a_file(value):
            prompts += _read_file(Path(value), alpaca_prompt if format_name == PLAIN else alpaca_question)
        else:
            prompts.append(value)
    if not prompts:
        raise UserError('no prompt: give one or more with --predict_data "Once upon a time", or a file of them')
    return prompts


def wrapping(processor: Any, tokenizer: Tokenizer) -> ChatFormat | None:
    """The chat format that makes messages of prompts under this `processor`; None where they stay as they are."""
    name = processor.prompt_format
    return None if name == PLAIN else chat_format(name, tokenizer)


def _names_a_file(value: str) -> bool:
    try:
        if Path(value).is_file():
            return True
        is_folder = "/" in value and Path(value).is_dir()
    except (OSError, ValueError):  # a long prompt, or one with a zero byte, is no path
        return False
    if is_folder:
        raise UserError(f"--predict_data {value}: is a folder; name a file of prompts in it")
    if value.endswith(FILE_SUFFIXES) and not any(character.isspace() for character in value):
        raise UserError(
            f"--predict_data {value}: no such file (a prompt that looks like a file's name goes into a file)"
        )
    return False


def _read_file(path: Path, write: Writer) -> list[str]:
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
        prompts = _prompts(_parse_json(text, path, 1), path, write)
    else:
        ended = text.replace("\r\n", "\n").split("\n")  # not at U+2028 and its like, which JSON may hold
        lines = [(number, line) for number, line in enumerate(ended, 1) if line.strip()]
        if path.suffix == ".jsonl":
            prompts = [_prompt(_parse_json(line, path, number), f"{path}:{number}", write) for number, line in lines]
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


def _prompts(value, path: Path, write: Writer) -> list[str]:
    if not isinstance(value, list):
        raise UserError(f"{path}: must hold a list of strings or of Alpaca's rows, not {type(value).__name__}")
    return [_prompt(item, f"{path}: item {number}", write) for number, item in enumerate(value)]


def _prompt(value, place: str, write: Writer) -> str:
    if isinstance(value, dict) and "instruction" in value:
        extra = required_text(value, "input", place) if value.get("input") is not None else ""
        return write(required_text(value, "instruction", place), extra)
    if not isinstance(value, str):
        what = "an object without 'instruction'" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{place}: a prompt is a JSON string (or a row with 'instruction'), not {what}")
    return value
