"""What every chat format can do, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby

import numpy as np

from llm_core.errors import UserError
from llm_core.text.pieces import Part
from llm_core.text.tokenizer import Tokenizer

Message = Mapping[str, str]
Round = tuple[list[Part], list[Part]]
EXAMPLE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class ChatFormat(ABC):
    """One way of writing conversations, for one tokenizer. `name` is what `chat_format` was given."""

    name: str
    tokenizer: Tokenizer
    stop_strings: tuple[str, ...] = ()  # what ends an answer besides stop_ids

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> list[Part]:
        """The conversation up to where the assistant begins to write. The last message is the user's."""

    @abstractmethod
    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """For training: (parts before an answer, parts of the answer with its end), one after the other.

        All of an answer's parts are learnt. The messages alternate, the user's first, after an optional system message.
        """

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: what this format writes behind one."""
        *_, (_, answer) = self.rounds(EXAMPLE)
        return special_ids(answer)

    def text(self, messages: Sequence[Message]) -> str:
        """The prompt for people to read: special ids as the vocabulary spells them."""
        return self.spelt(self.prompt(messages))

    def spelt(self, parts: Sequence[Part]) -> str:
        """Parts for people to read."""
        return "".join(part if isinstance(part, str) else "".join(map(self.spell, part)) for part in parts)

    def spell(self, token: int) -> str:
        """A special id for people to read."""
        return self.tokenizer.id_to_piece(token)


def part_ids(parts: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    """The ids of parts; texts that follow each other are encoded as one text."""
    ids: list[int] = []
    for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
        if is_text:
            ids += tokenizer.encode("".join(run))
        else:
            ids += [token for part in run for token in part]
    return ids


def special_ids(parts: Sequence[Part]) -> tuple[int, ...]:
    """The special ids of parts, each once."""
    return tuple(dict.fromkeys(token for part in parts if not isinstance(part, str) for token in part))


def encoded_behind_special(parts: Sequence[Part], tokenizer: Tokenizer) -> list[Part]:
    """The parts one by one, texts behind special ids as ids where the tokenizer encodes a beginning otherwise."""
    if tokenizer.inner is tokenizer:
        return list(parts)
    done: list[Part] = []
    for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
        texts = list(run)
        if is_text and done:
            ids, counts = tokenizer.inner.encode_parts([texts])
            texts = [ids[end - count : end].tolist() for end, count in zip(np.cumsum(counts), counts, strict=True)]
        done += texts
    return done


def pairs_of(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str]]]:
    """(system message, [(question, answer)]); the last answer may be missing, and is "" then."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = list(messages[1:] if system is not None else messages)
    if not turns:
        raise UserError("a conversation without a message")
    for number, turn in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise UserError(f"message {number} is the {turn['role']}'s, and it is the {expected}'s turn")
    contents = [turn["content"] for turn in turns]
    return system, list(zip(contents[::2], [*contents[1::2], ""], strict=False))
