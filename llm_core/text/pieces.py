"""What a chat template wrote, taken apart: the template's own text, its special tokens, and the words of people.

A template is filled in with contents between marks, so that afterwards it is known which characters came from whom. So
a special token that the template writes becomes its id, one that somebody typed stays text, and what is learnt follows
the assistant's words wherever the template put them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llm_core.text.tokenizer import SpecialToken

Part = str | list[int]  # of a prompt: text, or special ids

# Code points that Unicode keeps for a program's inner use, and that no text may hold.
_WORDS, _ANSWER, _END, _GENERATION, _END_GENERATION = (chr(0xFDD0 + i) for i in range(5))
_MARKS = re.compile(f"[{_WORDS}-{_END_GENERATION}]")
_CONTENT = re.compile(f"([{_WORDS}{_ANSWER}][^{_WORDS}-{_END}]*{_END}|[{_GENERATION}{_END_GENERATION}])")
_CACHED_TEXTS = 1000


class Piece(NamedTuple):
    """A run of what a template wrote. value: text, or the ids of a special token."""

    value: Part
    is_answer: bool = False  # words of the assistant
    is_content: bool = False  # words of anybody
    in_generation: bool = False  # between {% generation %} and {% endgeneration %}

    @property
    def is_special(self) -> bool:
        return not isinstance(self.value, str)


def clean(content: str) -> str:
    """`content` with U+FFFD for every code point that is a mark here (no real text holds one)."""
    return content if content.isascii() else _MARKS.sub("\ufffd", content)


def mark(content: str, is_answer: bool) -> str:
    """A clean `content` between marks. White space at its ends stays outside, so that templates can still strip it."""
    words = content.strip()
    if not words:
        return content
    start = content.index(words)
    return f"{content[:start]}{_ANSWER if is_answer else _WORDS}{words}{_END}{content[start + len(words) :]}"


def mark_generation(text: str) -> str:
    """`text` as what a template says to be the assistant's."""
    return f"{_GENERATION}{text}{_END_GENERATION}"


def without_marks(marked: str) -> str:
    """What the template would have written from contents without marks."""
    return _MARKS.sub("", marked)


class Splitter:
    """Takes marked text apart, for one tokenizer's special tokens."""

    def __init__(self, special_tokens: Iterable[SpecialToken]) -> None:
        """Of tokens with the same text the last counts. One without ids is left out of what is written."""
        tokens = {token.text: token for token in special_tokens if token.text}
        self._ids = {text: list(token.ids) for text, token in tokens.items()}
        longest_first = sorted(tokens.values(), key=lambda token: -len(token.text))
        self._tokens = re.compile("|".join(map(token_pattern, longest_first)) or "(?!)")
        self._split_texts: dict[str, list[Part]] = {}  # a template writes the same few texts over and over

    def split(self, marked: str) -> list[Piece]:
        """The pieces in order; empty ones are left out."""
        pieces: list[Piece] = []
        generation = False
        for number, text in enumerate(_CONTENT.split(marked)):
            if number % 2 == 0:
                pieces += [Piece(part, False, False, generation) for part in self._parts(text)]
            elif text in (_GENERATION, _END_GENERATION):
                generation = text == _GENERATION
            else:
                pieces.append(Piece(text[1:-1], text[0] == _ANSWER, True, generation))
        return pieces

    def _parts(self, text: str) -> list[Part]:
        """Text of the template: its special tokens as ids."""
        parts = self._split_texts.get(text)
        if parts is None:
            parts, position = [], 0
            for found in self._tokens.finditer(text):
                parts += [text[position : found.start()], self._ids.get(found[0]) or self._ids.get(found[0].strip())]
                position = found.end()
            parts = [part for part in (*parts, text[position:]) if part]
            if len(self._split_texts) >= _CACHED_TEXTS:
                self._split_texts.clear()
            self._split_texts[text] = parts
        return parts


def token_pattern(token: Any) -> str:
    """A regular expression for a SpecialToken or AddedToken with the white space that belongs to it."""
    before, behind = (r"\s*" if eaten else "" for eaten in (token.takes_space_before, token.takes_space_behind))
    return f"{before}{re.escape(token.text)}{behind}"


def merged(pieces: Iterable[Piece]) -> list[Part]:
    """The pieces' values, neighbouring texts as one text and neighbouring ids as one list."""
    parts: list[Part] = []
    for piece in pieces:
        if parts and isinstance(parts[-1], str) == isinstance(piece.value, str):
            parts[-1] = parts[-1] + piece.value
        else:
            parts.append(piece.value)
    return parts


def learnt_flags(pieces: Sequence[Piece]) -> list[bool]:
    """Which pieces the assistant has to write itself.

    Where the template says it ({% generation %}), that. Else the assistant's words up to the first special token behind
    them, which ends them, that token included; without such a token the words alone.
    """
    if any(piece.in_generation for piece in pieces):
        return [piece.in_generation for piece in pieces]
    flags = [False] * len(pieces)
    answer = None  # where the words began whose end has not come
    for number, piece in enumerate(pieces):
        if piece.is_answer:
            flags[number] = True
            answer = number if answer is None else answer
        elif piece.is_content:
            answer = None
        elif piece.is_special and answer is not None:
            flags[answer : number + 1] = [True] * (number + 1 - answer)
            answer = None
    return flags
