"""Command line overrides: `a.b.c` = value, laid over the tree."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from llm_core.config import keys
from llm_core.config.inert import inert_entry, is_inert_section
from llm_core.config.schema import RunConfig
from llm_core.config.tree import Node, Origin, Problems, join, lift, merge
from llm_core.config.yaml_source import parse_value

RANK = 1_000_000  # above every file

_ITEM = re.compile(r"^(?P<name>[^\[\]]+)\[(?P<item>[^\[\]]+)\]$")


class Override(NamedTuple):
    """One override: the key's path, its value (text as typed, or a ready list), and the flag as typed."""

    key: str
    value: Any
    flag: str = ""

    @property
    def where(self) -> str:
        return self.flag or f"--{self.key}"


def apply_overrides(tree: Node, overrides: Sequence[Override], flags: Sequence[str], problems: Problems) -> Node:
    """The tree with the overrides laid over it, in order.

    `flags` are the command line's own flags, to suggest one for a misspelt word without dots. A key may name a list's
    item by number (`callbacks.1.prefix`) or by type (`callbacks[CheckpointMonitor].prefix`; made if there is none).
    """
    for override in overrides:
        if not _is_word_known(override.key):
            near = difflib.get_close_matches(f"--{override.key}", [*flags, *(f"--{key}" for key in _top_keys())], 1)
            hint = f"; did you mean {near[0]}?" if near else keys.nearest_key(override.key, None, override.key)
            problems.add(override.where, "", f"unknown flag{hint}")
            continue
        parts = _split(override.key)
        if not all(parts):
            problems.add(override.where, "", "not a key; keys look like a.b.c")
            continue
        origin = Origin(override.where, RANK)
        tree = _set(tree, parts, "", tree, override, origin, problems)
    return tree


def _top_keys() -> list[str]:
    return [key for key in keys.fields_of(RunConfig)]


def _is_word_known(key: str) -> bool:
    if "." in key or "[" in key:
        return True
    return key in keys.fields_of(RunConfig) or inert_entry(key) is not None or is_inert_section(key)


def _split(key: str) -> list[str]:
    """`callbacks[CheckpointMonitor].prefix` -> ["callbacks", "[CheckpointMonitor]", "prefix"]."""
    parts: list[str] = []
    for part in key.split("."):
        item = _ITEM.match(part)
        parts += [item["name"], f"[{item['item']}]"] if item else [part]
    return parts


def _set(
    node: Node, parts: list[str], path: str, tree: Node, override: Override, origin: Origin, problems: Problems
) -> Node:
    """`node`, which stands at `path`, with the value set `parts` below it."""
    if not parts:
        value = _value(override, path, tree)
        return merge(node, lift(value, origin)) if isinstance(value, dict) else lift(value, origin)
    head, rest = parts[0], parts[1:]
    if isinstance(node.value, list) or head.startswith("["):
        return _set_item(node, head, rest, path, tree, override, origin, problems)
    if isinstance(node.value, dict):
        child = node.value.get(head, Node(None, origin))
    elif node.value is None:
        node, child = Node({}, origin), Node(None, origin)
    else:
        problems.add(override.where, override.key, f"{path} is a single value, {node.value!r}; it has no keys")
        return node
    return Node(
        {**node.value, head: _set(child, rest, join(path, head), tree, override, origin, problems)}, node.origin
    )


def _set_item(
    node: Node,
    head: str,
    rest: list[str],
    path: str,
    tree: Node,
    override: Override,
    origin: Origin,
    problems: Problems,
) -> Node:
    items = list(node.value) if isinstance(node.value, list) else []
    name = head.strip("[]")
    if name.isdigit():
        index = int(name)
        if index >= len(items):
            problems.add(override.where, override.key, f"{path} has {len(items)} items; the first is {path}.0")
            return node
    else:
        index = next((at for at, item in enumerate(items) if item.type_name() == name), len(items))
        if index == len(items):
            shape = keys.shape_at(RunConfig, tree, path)
            if shape is None or name not in shape.sections:
                known = list(shape.sections) if shape is not None else []
                near = difflib.get_close_matches(name, [tag for tag in known if tag], 1)
                hint = f"did you mean {path}[{near[0]}]?" if near else f"name one by number ({path}.0) or type"
                problems.add(override.where, override.key, f"{path} has no item {name}; {hint}")
                return node
            items.append(Node({"type": Node(name, origin)}, origin))
    items[index] = _set(items[index], rest, join(path, index), tree, override, origin, problems)
    return Node(items, node.origin)


def _value(override: Override, path: str, tree: Node) -> Any:
    """The value as the key's type wants it: text stays as typed, anything else is read as YAML."""
    if not isinstance(override.value, str):
        return override.value
    shape = keys.shape_at(RunConfig, tree, path)
    if shape is not None and keys.is_text(shape):
        may_be_none = type(None) in shape.scalars
        return None if may_be_none and override.value in ("None", "null") else override.value
    return parse_value(override.value)
