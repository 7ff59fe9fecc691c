"""Chat formats: how a conversation is written for a model, for training and for prompting alike.

A conversation is a list of messages {"role": system|user|assistant, "content": str}. What a format makes of it are
parts: text, which the tokenizer encodes, and special ids. Special tokens come from the format alone: "</s>" that
somebody typed stays four characters of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

from llm_core.errors import UserError
from llm_core.text.chat_base import (
    EXAMPLE,
    ChatFormat,
    Message,
    Round,
    encoded_behind_special,
    pairs_of,
    part_ids,
)
from llm_core.text.chat_fastchat import FastchatFormat
from llm_core.text.jinja import ChatTemplate, load_template
from llm_core.text.pieces import Part, Piece, Splitter, clean, learnt_flags, mark, merged, without_marks
from llm_core.text.tokenizer import Tokenizer

__all__ = ["INTERNLM", "PLAIN", "TOKENIZER", "ChatFormat", "Message", "chat_format", "part_ids", "template_path"]

PLAIN, INTERNLM, TOKENIZER = "none", "internlm", "tokenizer"
_FILE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".json")


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format called `name`.

    none: the text as it is; internlm; tokenizer: the chat template in the tokenizer's folder; a path to a folder, or to
    a Jinja or JSON file with a template; else one of fastchat's templates. UserError if there is no such format.
    """
    if name == PLAIN:
        return PlainFormat(tokenizer)
    if name == INTERNLM:
        return InternLMFormat(tokenizer)
    if name == TOKENIZER:
        return JinjaFormat(name, load_template(tokenizer.path.parent, tokenizer), tokenizer)
    if (path := template_path(name)) is not None:
        return JinjaFormat(name, load_template(path, tokenizer), tokenizer)
    return FastchatFormat(name, tokenizer)


def template_path(name: str) -> Path | None:
    """The file or folder that `name` is for `chat_format` (./NAME for one beside); None for the name of a format."""
    path = Path(name).expanduser()
    return path if "/" in name or path.suffix in _FILE_SUFFIXES else None


class PlainFormat(ChatFormat):
    """The texts as they are: bos, then each question with its answer and eos. Messages of the system come first."""

    name = PLAIN

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message]) -> list[Part]:
        """See ChatFormat."""
        *former, (question, _) = self._written(messages)
        parts: list[Part] = [self.tokenizer.start_ids]
        for asked, answer in former:
            parts += [*asked, *answer]
        return parts + question

    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """See ChatFormat."""
        first, *rest = self._written(messages)
        return [([self.tokenizer.start_ids, *first[0]], first[1]), *rest]

    def _written(self, messages: Sequence[Message]) -> list[Round]:
        system, pairs = pairs_of(messages)
        before = [f"{system}\n"] if system else []
        rounds: list[Round] = []
        for question, answer in pairs:
            rounds.append(([*before, question], [answer or "", self.tokenizer.end_ids]))
            before = []
        return rounds


class InternLMFormat(ChatFormat):
    """InternLM's chat: <|User|>:QUESTION<eoh>\\n<|Bot|>:ANSWER<eoa>\\n, and </s> at the end of a conversation.

    As MindFormers' preprocessing does it, each text between the marks is encoded by itself. A tokenizer of another
    family without <eoh> and <eoa> gets them as text.
    """

    name = INTERNLM

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        known = {token.text: list(token.ids) for token in tokenizer.special_tokens} | _internlm_marks(tokenizer)
        self._end_of_human: Part = known.get("<eoh>", "<eoh>")
        self._end_of_answer: Part = known.get("<eoa>", "<eoa>")
        self._new_line = _new_line_ids(tokenizer)
        if isinstance(self._end_of_answer, str):
            self.stop_strings = (self._end_of_answer, "<|User|>:")

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """<eoa>, and eos."""
        end = [] if isinstance(self._end_of_answer, str) else self._end_of_answer
        return (*end, *self.tokenizer.end_ids)

    def prompt(self, messages: Sequence[Message]) -> list[Part]:
        """See ChatFormat."""
        *former, (question, _) = self._written(messages)
        return [part for asked, answer in former for part in asked + answer] + question

    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """See ChatFormat."""
        rounds = self._written(messages)
        rounds[-1][1].append(self.tokenizer.end_ids)
        return rounds

    def spell(self, token: int) -> str:
        """See ChatFormat."""
        names = {tuple(self._end_of_human): "<eoh>", tuple(self._end_of_answer): "<eoa>", tuple(self._new_line): "\n"}
        return names.get((token,)) or super().spell(token)

    def _written(self, messages: Sequence[Message]) -> list[Round]:
        system, pairs = pairs_of(messages)
        before: list[Part] = [self.tokenizer.start_ids]
        if system:
            before += [f"<|System|>:{system}", self._new_line]
        rounds: list[Round] = []
        for question, answer in pairs:
            asked = [*before, f"<|User|>:{question}", self._end_of_human, self._new_line, "<|Bot|>:"]
            # an empty list of ids between two texts: they are encoded apart
            rounds.append((asked, [[], answer or "", self._end_of_answer, self._new_line]))
            before = []
        return rounds


class JinjaFormat(ChatFormat):
    """A chat template of Hugging Face's kind. It writes all special tokens itself, bos included."""

    def __init__(self, name: str, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.name, self.template, self.tokenizer = name, template, tokenizer
        self._splitter = Splitter(tokenizer.special_tokens)

    def prompt(self, messages: Sequence[Message]) -> list[Part]:
        """See ChatFormat."""
        return merged(_behind_special(self._pieces(messages, add_generation_prompt=True), self.tokenizer))

    def text(self, messages: Sequence[Message]) -> str:
        """See ChatFormat."""
        return without_marks(self.template.render(messages, add_generation_prompt=True))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """See ChatFormat."""
        pieces = self._pieces(EXAMPLE, add_generation_prompt=False)
        ends = [p.value for p, learnt in zip(pieces, learnt_flags(pieces), strict=True) if learnt and p.is_special]
        return tuple(dict.fromkeys(token for ids in ends for token in ids))

    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """See ChatFormat. Learnt: see pieces.learnt_flags."""
        pieces = self._pieces(messages, add_generation_prompt=False)
        flagged = zip(_behind_special(pieces, self.tokenizer), learnt_flags(pieces), strict=True)
        runs = [
            (learnt, merged(piece for piece, _ in run)) for learnt, run in groupby(flagged, key=lambda pair: pair[1])
        ]
        rounds: list[Round] = []
        before: list[Part] = []
        for learnt, parts in runs:
            if learnt:
                rounds.append((before, parts))
            before = [] if learnt else parts
        return rounds  # what follows the last answer is left out

    def _pieces(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[Piece]:
        messages = [{"role": m["role"], "content": clean(m["content"])} for m in messages]
        marked = [{**m, "content": mark(m["content"], m["role"] == "assistant")} for m in messages]
        plain = self.template.render(messages, add_generation_prompt=add_generation_prompt)
        written = self.template.render(marked, add_generation_prompt=add_generation_prompt)
        pieces = self._splitter.split(written)
        # a template may look into a content, and find the marks there
        if without_marks(written) != without_marks(plain) or any(
            isinstance(piece.value, str) and without_marks(piece.value) != piece.value for piece in pieces
        ):
            if add_generation_prompt and not self._hold_special_tokens(messages):
                return self._splitter.split(plain)  # whose words are whose matters to training alone
            raise UserError(
                f"{self.template.source}: the chat template changes the words of a message, so that they cannot be "
                "told from its own; take another template (--chat_template)"
            )
        return pieces

    def _hold_special_tokens(self, messages: Sequence[Message]) -> bool:
        return any(token.text in m["content"] for m in messages for token in self.tokenizer.special_tokens)


def _behind_special(pieces: list[Piece], tokenizer: Tokenizer) -> list[Piece]:
    values = encoded_behind_special([piece.value for piece in pieces], tokenizer)
    return [piece._replace(value=value) for piece, value in zip(pieces, values, strict=True)]


def _internlm_marks(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """InternLM's tokenizer.model keeps its last two pieces, which it calls unused, for <eoa> and <eoh>."""
    ids = {"<eoa>": tokenizer.vocab_size - 2, "<eoh>": tokenizer.vocab_size - 1}
    unused = all(tokenizer.id_to_piece(token).startswith("<TOKENS_UNUSED_") for token in ids.values())
    return {text: [token] for text, token in ids.items()} if unused else {}


def _new_line_ids(tokenizer: Tokenizer) -> list[int]:
    """A line break by itself: without the space that some tokenizers put in front of a text."""
    behind = tokenizer.encode("a\n")
    before = tokenizer.encode("a")
    return behind[len(before) :] if behind[: len(before)] == before else tokenizer.encode("\n")
