"""Formats of instruction data -> conversations: rounds of what a person says and what the assistant answers."""

from __future__ import annotations

from typing import Any

from llm_core.data.inputs import required_text
from llm_core.errors import UserError
from llm_core.text.templates import alpaca_prompt

_HUMAN, _ASSISTANT = "human", "gpt"


def rounds_of(row: Any, place: str) -> tuple[list[tuple[str, str]], int]:
    """ShareGPT form {"conversations": [{"from": "human"|"gpt", "value": ...}, ...]} -> rounds.

    Returns the rounds [(question, answer)], and the number of turns left out: an answer before the first question,
    and a last question without an answer (nothing could be learnt from either).
    UserError naming `place` ("FILE: row 3") for missing keys, an unknown speaker, or speakers out of turn.
    """
    turns = _turns(row, place)
    left_out = 0
    if turns and turns[0][0] == _ASSISTANT:
        turns, left_out = turns[1:], 1
    if len(turns) % 2:
        turns, left_out = _without_last_question(turns, place), left_out + 1
    for number, (speaker, _) in enumerate(turns):
        expected = (_HUMAN, _ASSISTANT)[number % 2]
        if speaker != expected:
            raise UserError(f"{place}: turn {number + left_out} is from {speaker!r}, and it is {expected!r}'s turn")
    return [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)], left_out


def _turns(row: Any, place: str) -> list[tuple[str, str]]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if turns is None and isinstance(row, dict) and "instruction" in row:
        raise UserError(
            f"{place}: has no key 'conversations'; this is Alpaca's format: convert the file with alpaca_converter.py"
        )
    if turns is None:
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise UserError(f"{place}: has no key 'conversations' ({keys})")
    if not isinstance(turns, list):
        raise UserError(f"{place}: 'conversations' must be a list, and is a {type(turns).__name__}")
    found = []
    for number, turn in enumerate(turns):
        at = f"{place}, turn {number}"
        speaker = required_text(turn, "from", at)
        if speaker not in (_HUMAN, _ASSISTANT):
            raise UserError(f"{at}: 'from' must be {_HUMAN!r} or {_ASSISTANT!r}, and is {speaker!r}")
        found.append((speaker, required_text(turn, "value", at)))
    return found


def _without_last_question(turns: list[tuple[str, str]], place: str) -> list[tuple[str, str]]:
    if turns[-1][0] != _HUMAN:
        raise UserError(f"{place}: two turns of {_ASSISTANT!r} follow each other")
    return turns[:-1]


def alpaca_to_conversation(row: Any, number: int, place: str) -> dict[str, Any]:
    """Alpaca's {"instruction", "input", "output"} -> {"id": str(number), "conversations": [human, gpt]}.

    UserError naming `place` for a missing key; "input" may be missing.
    """
    instruction, output = required_text(row, "instruction", place), required_text(row, "output", place)
    extra = required_text(row, "input", place) if row.get("input") is not None else ""
    return {
        "id": str(number),
        "conversations": [
            {"from": _HUMAN, "value": alpaca_prompt(instruction, extra)},
            {"from": _ASSISTANT, "value": output},
        ],
    }
