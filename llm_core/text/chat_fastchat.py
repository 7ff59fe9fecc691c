"""fastchat's conversation templates as chat formats."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from llm_core.errors import UserError
from llm_core.text.chat_base import EXAMPLE, ChatFormat, Message, Round, encoded_behind_special, pairs_of, special_ids
from llm_core.text.pieces import Part, Splitter, mark
from llm_core.text.templates import conversation_template, written_rounds
from llm_core.text.tokenizer import SpecialToken, Tokenizer

Outline = list[Part | int]  # parts, and numbers of contents
_KEPT_OUTLINES = 1000


class FastchatFormat(ChatFormat):
    """A template of fastchat. bos is put in front; an answer ends with the mark that the template writes, else eos."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        """UserError for a name that fastchat does not have."""
        self.name, self.tokenizer = name, tokenizer
        conversation = _known_template(name)
        conversation.messages = []  # some templates come with an example conversation
        self._conversation = conversation
        self._splitter = Splitter([*_usual_marks(tokenizer), *tokenizer.special_tokens])
        self._outlines: dict[tuple[bool, ...], list[tuple[Outline, Outline]]] = {}
        marks = conversation.stop_str if isinstance(conversation.stop_str, list) else [conversation.stop_str]
        speaker = conversation.roles[0]
        self.stop_strings = tuple(m for m in (*marks, f"{speaker}:" if speaker else "") if m)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """See ChatFormat."""
        *_, (_, answer) = self._written(*pairs_of(EXAMPLE))
        return special_ids(answer)

    def prompt(self, messages: Sequence[Message]) -> list[Part]:
        """See ChatFormat."""
        return _up_to_answer(self._encoded(self._written(*_without_answer(messages))))

    def text(self, messages: Sequence[Message]) -> str:
        """See ChatFormat."""
        return self.spelt(_up_to_answer(self._with_bos(self._written(*_without_answer(messages)))))

    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """See ChatFormat."""
        return self._encoded(self._written(*pairs_of(messages)))

    def _encoded(self, rounds: list[Round]) -> list[Round]:
        """The rounds with bos in front, which the template knows nothing of: behind it a text begins."""
        parts = [part for asked, answer in rounds for part in asked + answer]
        done = iter(encoded_behind_special(parts, self.tokenizer))
        return self._with_bos([([next(done) for _ in asked], [next(done) for _ in answer]) for asked, answer in rounds])

    def _with_bos(self, rounds: list[Round]) -> list[Round]:
        (asked, answer), *rest = rounds
        bos = self.tokenizer.start_ids
        written = asked[:1] == [bos]  # the template writes it itself
        return rounds if written or not bos else [([bos, *asked], answer), *rest]

    def _written(self, system: str | None, pairs: list[tuple[str, str]]) -> list[Round]:
        """What the template writes."""
        contents = [content for pair in pairs for content in pair]
        if self._conversation.sep_style.name == "RWKV":  # the one style that changes the words of people
            contents = [content.replace("\r\n", "\n").replace("\n\n", "\n") for content in contents]
        contents.append(system)
        # fastchat puts strings together, by nothing but which of them are empty
        key = (system is not None, *map(bool, contents))
        if key not in self._outlines:
            if len(self._outlines) >= _KEPT_OUTLINES:
                self._outlines.clear()
            self._outlines[key] = self._outline(contents)
        return [(_filled(asked, contents), _filled(answer, contents)) for asked, answer in self._outlines[key]]

    def _outline(self, contents: list[str | None]) -> list[tuple[Outline, Outline]]:
        """The rounds that the template makes of such contents, with the number of a content where its words come."""
        conversation = self._conversation
        numbers = [mark(str(i), False) if content else "" for i, content in enumerate(contents)]
        if contents[-1] is not None:
            conversation = conversation.copy()
            conversation.set_system_message(numbers[-1])
        before: Outline = []  # what the next question begins with
        rounds = []
        for question, answer in written_rounds(conversation, list(zip(numbers[:-1:2], numbers[1:-1:2], strict=True))):
            asked, answered = self._outline_of(question), self._outline_of(answer)
            ends = [number for number, part in enumerate(answered) if isinstance(part, list)]
            end = ends[0] + 1 if ends else len(answered)
            closing = [] if ends or not self.tokenizer.end_ids else [self.tokenizer.end_ids]
            rounds.append(([*before, *asked], [*answered[:end], *closing]))
            before = answered[end:]  # llama-2's bos of the next round
        return rounds

    def _outline_of(self, marked: str) -> Outline:
        return [int(piece.value) if piece.is_content else piece.value for piece in self._splitter.split(marked)]


def _without_answer(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str]]]:
    system, pairs = pairs_of(messages)
    return system, [*pairs[:-1], (pairs[-1][0], "")]


def _up_to_answer(rounds: list[Round]) -> list[Part]:
    *former, (question, _) = rounds
    return [part for asked, answer in former for part in asked + answer] + question


def _filled(outline: Outline, contents: list[str | None]) -> list[Part]:
    parts: list[Part] = []
    for part in outline:
        if isinstance(part, list):
            parts.append(part)
            continue
        text = contents[part] if isinstance(part, int) else part
        if parts and isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)
    return parts


def _known_template(name: str) -> Any:
    from fastchat.conversation import conv_templates

    if name not in conv_templates:
        names = ["none", "internlm", "tokenizer", *conv_templates]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else "vicuna_v1.1 is one"
        raise UserError(
            f"{name}: no chat format of this name ({hint}); give none, internlm, tokenizer (the template in its "
            "folder), a path (with a slash in it), or the name of a fastchat template"
        )
    return conversation_template(name)


def _usual_marks(tokenizer: Tokenizer) -> list[SpecialToken]:
    """fastchat writes Llama's <s> and </s>, whatever the tokenizer calls its own."""
    return [SpecialToken("<s>", tuple(tokenizer.bos_ids)), SpecialToken("</s>", tuple(tokenizer.end_ids))]
