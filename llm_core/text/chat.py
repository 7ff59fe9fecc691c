"""Chat formats: how a conversation is written for a model, for training and for prompting alike.

A conversation is a list of messages {"role": system|user|assistant, "content": str}. What a format makes of it are
parts: text, which the tokenizer encodes, and special ids. Special tokens come from the format alone: "</s>" that
somebody typed stays four characters of text.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

from llm_core.errors import UserError
from llm_core.text.jinja import ChatTemplate, load_template
from llm_core.text.pieces import Part, Piece, Splitter, clean, learnt_flags, mark, merged, without_marks
from llm_core.text.templates import conversation_template, written_rounds
from llm_core.text.tokenizer import SpecialToken, Tokenizer

Message = Mapping[str, str]
Round = tuple[list[Part], list[Part]]

PLAIN, INTERNLM, TOKENIZER = "none", "internlm", "tokenizer"
_FILE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".json")


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
        *_, (_, answer) = self.rounds([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        return tuple(dict.fromkeys(token for part in answer if not isinstance(part, str) for token in part))

    def text(self, messages: Sequence[Message]) -> str:
        """The prompt for people to read: special ids as the vocabulary spells them."""
        return "".join(
            part if isinstance(part, str) else "".join(map(self.spell, part)) for part in self.prompt(messages)
        )

    def spell(self, token: int) -> str:
        """A special id for people to read."""
        return self.tokenizer.id_to_piece(token)


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format called `name`.

    none: the text as it is; internlm; tokenizer: the chat template in the tokenizer's folder; a path to a folder or a
    Jinja file with a template; else one of fastchat's templates. UserError if there is no such format.
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


def part_ids(parts: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    """The ids of parts; texts that follow each other are encoded as one text."""
    ids: list[int] = []
    for is_text, run in groupby(parts, key=lambda part: isinstance(part, str)):
        if is_text:
            ids += tokenizer.encode("".join(run))
        else:
            ids += [token for part in run for token in part]
    return ids


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
        system, pairs = _pairs(messages)
        before = [f"{system}\n"] if system else []
        rounds: list[Round] = []
        for question, answer in pairs:
            rounds.append(([*before, question], [answer or "", self.tokenizer.end_ids]))
            before = []
        return rounds


class FastchatFormat(ChatFormat):
    """A template of fastchat. bos is put in front; an answer ends with the mark that the template writes, else eos."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        """UserError for a name that fastchat does not have."""
        self.name, self.tokenizer = name, tokenizer
        conversation = _known_template(name)
        conversation.messages = []  # some templates come with an example conversation
        self._conversation = conversation
        self._splitter = Splitter([*_usual_marks(tokenizer), *tokenizer.special_tokens])
        marks = conversation.stop_str if isinstance(conversation.stop_str, list) else [conversation.stop_str]
        speaker = conversation.roles[0]
        self.stop_strings = tuple(m for m in (*marks, f"{speaker}:" if speaker else "") if m)

    def prompt(self, messages: Sequence[Message]) -> list[Part]:
        """See ChatFormat."""
        system, pairs = _pairs(messages)
        *former, (question, _) = self._written(system, [*pairs[:-1], (pairs[-1][0], "")])
        return merged([piece for asked, answer in former for piece in asked + answer] + question)

    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """See ChatFormat."""
        return [(merged(question), merged(answer)) for question, answer in self._written(*_pairs(messages))]

    def _written(self, system: str | None, pairs: list[tuple[str, str]]) -> list[tuple[list[Piece], list[Piece]]]:
        conversation = self._conversation
        if system is not None:
            conversation = conversation.copy()
            conversation.set_system_message(mark(clean(system), False))
        marked = [(mark(clean(question), False), mark(clean(answer), True)) for question, answer in pairs]
        start = self.tokenizer.start_ids
        bos = [Piece(start)] if start else []
        before = bos  # what the next question begins with
        rounds = []
        for question, answer in written_rounds(conversation, marked):
            asked = self._splitter.split(question)
            if before is bos and asked and asked[0].value == start:
                before = []  # the template writes bos itself
            answered, behind = self._ended(self._splitter.split(answer))
            rounds.append(([*before, *asked], answered))
            before = behind
        return rounds

    def _ended(self, pieces: list[Piece]) -> tuple[list[Piece], list[Piece]]:
        """An answer with its end mark, and what the template writes behind it (llama-2's bos of the next round)."""
        for number, piece in enumerate(pieces):
            if piece.is_special:
                return pieces[: number + 1], [p for p in pieces[number + 1 :] if not _is_blank(p)]
        end = self.tokenizer.end_ids
        return [*pieces, *([Piece(end)] if end else [])], []


def _is_blank(piece: Piece) -> bool:
    return isinstance(piece.value, str) and not piece.value


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
        system, pairs = _pairs(messages)
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
        return merged(self._pieces(messages, add_generation_prompt=True))

    def rounds(self, messages: Sequence[Message]) -> list[Round]:
        """See ChatFormat. Learnt: see pieces.learnt_flags."""
        pieces = self._pieces(messages, add_generation_prompt=False)
        runs = [
            (learnt, merged(piece for piece, _ in run))
            for learnt, run in groupby(zip(pieces, learnt_flags(pieces), strict=True), key=lambda pair: pair[1])
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
            raise UserError(
                f"{self.template.source}: the chat template changes the words of a message, so that they cannot be "
                "told from its own; take another template (--chat_template)"
            )
        return pieces


def _known_template(name: str):
    from fastchat.conversation import conv_templates

    if name not in conv_templates:
        names = [PLAIN, INTERNLM, TOKENIZER, *conv_templates]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else "vicuna_v1.1 is one"
        raise UserError(
            f"{name}: no chat format of this name ({hint}); give none, internlm, tokenizer (the template in its "
            "folder), a path (with a slash in it), or the name of a fastchat template"
        )
    return conversation_template(name)


def _internlm_marks(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """InternLM's tokenizer.model keeps its last two pieces, which it calls unused, for <eoa> and <eoh>."""
    ids = {"<eoa>": tokenizer.vocab_size - 2, "<eoh>": tokenizer.vocab_size - 1}
    unused = all(tokenizer.id_to_piece(token).startswith("<TOKENS_UNUSED_") for token in ids.values())
    return {text: [token] for text, token in ids.items()} if unused else {}


def _usual_marks(tokenizer: Tokenizer) -> list[SpecialToken]:
    """fastchat writes Llama's <s> and </s>, whatever the tokenizer calls its own."""
    return [SpecialToken("<s>", tuple(tokenizer.start_ids)), SpecialToken("</s>", tuple(tokenizer.end_ids))]


def _new_line_ids(tokenizer: Tokenizer) -> list[int]:
    """A line break by itself: without the space that some tokenizers put in front of a text."""
    behind = tokenizer.encode("a\n")
    before = tokenizer.encode("a")
    return behind[len(before) :] if behind[: len(before)] == before else tokenizer.encode("\n")


def _pairs(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str]]]:
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
