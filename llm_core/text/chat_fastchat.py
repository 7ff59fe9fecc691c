"""fastchat's conversation templates as chat formats."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from llm_core.errors import UserError
from llm_core.text.chat_base import ChatFormat, Message, Round, pairs_of
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

    def prompt(self, messages: Sequence[Message]) -> list[Part]:
        """See ChatFormat."""
        system, pairs = pairs_of(messages)
        *former, (question, _) = self._written(system, [*pairs[:-1], (pairs[-1][0], "")])
        return [part for asked, answer in former for part in asked + answer] + question

    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """See ChatFormat."""
        return self._written(*pairs_of(messages))

    def _written(self, system: str | None, pairs: list[tuple[str, str]]) -> list[Round]:
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
        bos = [self.tokenizer.start_ids] if self.tokenizer.start_ids else []
        before: Outline = bos  # what the next question begins with
        rounds = []
        for question, answer in written_rounds(conversation, list(zip(numbers[:-1:2], numbers[1:-1:2], strict=True))):
            asked, answered = self._outline_of(question), self._outline_of(answer)
            if before is bos and asked[:1] == bos:
                before = []  # the template writes bos itself
            ends = [number for number, part in enumerate(answered) if isinstance(part, list)]
            end = ends[0] + 1 if ends else len(answered)
            closing = [] if ends or not self.tokenizer.end_ids else [self.tokenizer.end_ids]
            rounds.append(([*before, *asked], [*answered[:end], *closing]))
            before = answered[end:]  # llama-2's bos of the next round
        return rounds

    def _outline_of(self, marked: str) -> Outline:
        return [int(piece.value) if piece.is_content else piece.value for piece in self._splitter.split(marked)]


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
    return [SpecialToken("<s>", tuple(tokenizer.start_ids)), SpecialToken("</s>", tuple(tokenizer.end_ids))]
