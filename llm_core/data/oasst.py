"""OpenAssistant's oasst1: trees of messages, of which a conversation is the best ranked path.

A tree is {"message_tree_id", "prompt": message}, a message {"text", "role": "prompter"|"assistant", "rank", "replies":
[message, ...]}. Rank 0 is the best; a reply without a rank comes after those that have one. The flat form has a message
a row, with "message_id" and "parent_id" instead of "replies".
"""

from __future__ import annotations

from typing import Any

from llm_core.data.inputs import Rows, required_text
from llm_core.errors import UserError

_ROLES = {"prompter": "user", "assistant": "assistant"}


def trees_of(rows: Rows) -> Rows:
    """`rows` as trees: as they are if they are trees, else each first message with its replies, in the file's order."""
    if not (isinstance(rows.values[0], dict) and "message_id" in rows.values[0] and "prompt" not in rows.values[0]):
        return rows
    messages: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows.values):
        name = required_text(row, "message_id", rows.place(number))
        if name in messages:
            raise UserError(f"{rows.place(number)}: the message {name!r} is in the file twice")
        messages[name] = {**row, "replies": []}
    trees, lines = [], []
    for number, message in enumerate(messages.values()):
        parent = message.get("parent_id")
        if parent is None:
            trees.append({"prompt": message})
            lines.append(rows.lines[number])
        elif not isinstance(parent, str) or parent not in messages:
            raise UserError(f"{rows.place(number)}: answers the message {parent!r}, which is not in the file")
        else:
            messages[parent]["replies"].append(message)
    if not trees:
        raise UserError(f"{rows.path}: no message without a 'parent_id', which a conversation could begin with")
    return Rows(rows.path, trees, lines, rows.in_list)


def oasst_messages(tree: Any, place: str) -> list[tuple[str, str]]:
    """(role, text) along the best ranked path. UserError naming `place` for what is no tree."""
    message = tree.get("prompt") if isinstance(tree, dict) else None
    if not isinstance(message, dict):
        raise UserError(f"{place}: has no object 'prompt'; a row of oasst1 is a tree, or a message with 'message_id'")
    path = []
    while message is not None:
        at = f"{place}, message {len(path)}"
        role = required_text(message, "role", at)
        if role not in _ROLES:
            raise UserError(f"{at}: 'role' must be 'prompter' or 'assistant', and is {role!r}")
        path.append((_ROLES[role], required_text(message, "text", at)))
        message = min(_replies(message, at), key=lambda reply: _rank(reply, at), default=None)
    return path


def _replies(message: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Those that are not deleted."""
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise UserError(f"{place}: 'replies' must be a list of messages, each an object with 'role' and 'text'")
    return [reply for reply in replies if not reply.get("deleted")]


def _rank(reply: dict[str, Any], place: str) -> float:
    rank = reply.get("rank")
    if rank is not None and not isinstance(rank, int | float):
        raise UserError(f"{place}: the 'rank' of a reply must be a number or null, and is {rank!r}")
    return float("inf") if rank is None else rank
