"""Formats of instruction data -> conversations: messages of a person and of an assistant in turn.

sharegpt  {"conversations": [{"from": "human"|"gpt"|"system", "value": ...}, ...]}
messages  {"messages": [{"role": "user"|"assistant"|"system", "content": ...}, ...]}   (OpenAI's form)
alpaca    {"instruction": ..., "input": ..., "output": ...}, and "system" and "history": [[question, answer], ...]
src_tgt   {"src": ..., "tgt": ...}, or lists of turns (PaddleNLP's form)
oasst1    a tree of messages a row, or one of its messages a row: see oasst.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_core.data.choices import ChoiceQuestion
from llm_core.data.inputs import Rows, read_rows, required_text
from llm_core.data.oasst import oasst_messages, trees_of
from llm_core.errors import UserError
from llm_core.text.templates import alpaca_prompt, choice_answer, choice_instruction

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_SHAREGPT = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
_OPENAI = {USER: USER, ASSISTANT: ASSISTANT, SYSTEM: SYSTEM}


@dataclass(frozen=True)
class Conversation:
    """messages: [{"role", "content"}], the user's and the assistant's in turn, after at most one of the system; or [].

    left_out: turns that nothing could be learnt from: an answer before the first question, a last question without an
    answer. has_empty_turn: a question or an answer has no words in it.
    """

    messages: list[dict[str, str]]
    left_out: int = 0
    has_empty_turn: bool = False


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def sharegpt(row: Any, place: str) -> Conversation:
    """See the module. UserError naming `place` for missing keys, an unknown speaker, or speakers out of turn."""
    return _from_turns(_turns(row, "conversations", "from", "value", _SHAREGPT, place), place)


def openai_messages(row: Any, place: str) -> Conversation:
    """See the module. UserError as for sharegpt."""
    return _from_turns(_turns(row, "messages", "role", "content", _OPENAI, place), place)


def _turns(
    row: Any, list_key: str, speaker_key: str, text_key: str, roles: dict[str, str], place: str
) -> list[dict[str, str]]:
    turns = row.get(list_key) if isinstance(row, dict) else None
    if turns is None and isinstance(row, dict) and "instruction" in row:
        raise UserError(
            f"{place}: has no key {list_key!r}; this is Alpaca's format: give --dataset_type alpaca, or convert the "
            "file with alpaca_converter.py"
        )
    if turns is None:
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise UserError(f"{place}: has no key {list_key!r} ({keys})")
    if not isinstance(turns, list):
        raise UserError(f"{place}: {list_key!r} must be a list, and is a {type(turns).__name__}")
    found = []
    for number, turn in enumerate(turns):
        at = f"{place}, turn {number}"
        speaker = required_text(turn, speaker_key, at)
        if speaker not in roles:
            known = " or ".join(repr(name) for name in roles if roles[name] != SYSTEM)
            raise UserError(f"{at}: {speaker_key!r} must be {known}, and is {speaker!r}")
        found.append(_message(roles[speaker], required_text(turn, text_key, at)))
    return found


def alpaca(row: Any, place: str) -> Conversation:
    """See the module. The question is the instruction, and the input on a line of its own."""
    instruction, output = required_text(row, "instruction", place), required_text(row, "output", place)
    extra = required_text(row, "input", place) if row.get("input") is not None else ""
    messages = []
    if row.get("system"):
        messages.append(_message(SYSTEM, required_text(row, "system", place)))
    for number, turn in enumerate(_list(row, "history", place)):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise UserError(f"{place}: 'history' {number} must be a list of a question and an answer")
        messages += [_message(USER, turn[0]), _message(ASSISTANT, turn[1])]
    messages += [_message(USER, alpaca_question(instruction, extra)), _message(ASSISTANT, output)]
    return _from_turns(messages, place)


def alpaca_question(instruction: str, extra: str) -> str:
    """What a person says who gives `instruction`, with `extra` to go by."""
    return f"{instruction}\n{extra}" if extra else instruction


def _list(row: dict[str, Any], key: str, place: str) -> list[Any]:
    value = row.get(key)
    if value is not None and not isinstance(value, list):
        raise UserError(f"{place}: {key!r} must be a list, and is a {type(value).__name__}")
    return value or []


def src_tgt(row: Any, place: str) -> Conversation:
    """See the module. UserError if the two lists do not go together."""
    sides = []
    for key in ("src", "tgt"):
        value = row.get(key) if isinstance(row, dict) else None
        if not isinstance(value, list):
            value = [required_text(row, key, place)]
        sides.append([required_text({key: text}, key, f"{place}, turn {i}") for i, text in enumerate(value)])
    questions, answers = sides
    if not questions or len(questions) != len(answers):
        raise UserError(f"{place}: 'src' has {len(questions)} turns and 'tgt' {len(answers)}; they must go in pairs")
    turns = [
        message
        for question, answer in zip(questions, answers, strict=True)
        for message in (_message(USER, question), _message(ASSISTANT, answer))
    ]
    return _from_turns(turns, place)


def oasst1(row: Any, place: str) -> Conversation:
    """A tree: the best ranked reply to every message, from the first on."""
    return _from_turns([_message(role, text) for role, text in oasst_messages(row, place)], place)


def _from_turns(turns: list[dict[str, str]], place: str) -> Conversation:
    """Leave out what teaches nothing, and make sure that the speakers take turns."""
    system = turns[:1] if turns and turns[0]["role"] == SYSTEM else []
    turns = turns[len(system) :]
    left_out = 0
    if turns and turns[0]["role"] == ASSISTANT:
        turns, left_out = turns[1:], 1
    first = len(system) + left_out
    for number, turn in enumerate(turns):
        expected = (USER, ASSISTANT)[number % 2]
        if turn["role"] != expected:
            raise UserError(f"{place}: turn {first + number} is the {turn['role']}'s, and it is the {expected}'s turn")
    if len(turns) % 2:  # the last is a question
        turns, left_out = turns[:-1], left_out + 1
    if not turns:
        return Conversation([], left_out)
    return Conversation(system + turns, left_out, any(not turn["content"].strip() for turn in turns))


FORMATS: dict[str, Callable[[Any, str], Conversation]] = {
    "sharegpt": sharegpt,
    "messages": openai_messages,
    "alpaca": alpaca,
    "src_tgt": src_tgt,
    "oasst1": oasst1,
}


def read_conversations(path: Path, kind: str) -> Rows:
    """The rows of a file; the single messages of oasst1 as trees."""
    rows = read_rows(path)
    return trees_of(rows) if kind == "oasst1" else rows


def alpaca_to_conversation(row: Any, number: int, place: str) -> dict[str, Any]:
    """Alpaca's {"instruction", "input", "output"} -> {"id": str(number), "conversations": [human, gpt]}.

    The question is Stanford Alpaca's prompt, as MindFormers' converter writes it. UserError naming `place` for a
    missing key; "input" may be missing.
    """
    instruction, output = required_text(row, "instruction", place), required_text(row, "output", place)
    extra = required_text(row, "input", place) if row.get("input") is not None else ""
    return {
        "id": str(number),
        "conversations": [
            {"from": "human", "value": alpaca_prompt(instruction, extra)},
            {"from": "gpt", "value": output},
        ],
    }


def alpaca_of_choice(question: ChoiceQuestion) -> dict[str, str]:
    """A question with four choices as an Alpaca row, whose answer is a sentence with the right letter."""
    instruction, extra = choice_instruction(question.subject, question.question, question.choices)
    return {"instruction": instruction, "input": extra, "output": choice_answer(question.answer)}
