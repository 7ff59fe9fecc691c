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
        elif parent not in messages:
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
        role = required_text(message, "role", f"{place}, message {len(path)}")
        if role not in _ROLES:
            raise UserError(f"{place}, message {len(path)}: 'role' must be 'prompter' or 'assistant', and is {role!r}")
        path.append((_ROLES[role], required_text(message, "text", f"{place}, message {len(path)}")))
        replies = [reply for reply in message.get("replies") or [] if not reply.get("deleted")]
        message = min(replies, key=_rank, default=None)
    return path


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else rank
