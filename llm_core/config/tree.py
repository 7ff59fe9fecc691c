"""A YAML document as a tree in which every value knows where it was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where a value was written.

    `where` is "file:line", a command line flag as typed, or an HF folder's config.json. `rank` is the number of the
    layer: a value of a higher rank was laid over those of lower rank.
    """

    where: str
    rank: int = 0


@dataclass
class Node:
    """One value: a scalar, a dict of nodes or a list of nodes. A mapping entry's origin is its key's line."""

    value: Any
    origin: Origin

    def get(self, key: str) -> Node | None:
        """The entry `key` of a mapping, or None."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def type_name(self) -> str | None:
        """The value of the entry that tells which of several sections this is: `type` or `pet_type`."""
        tag = self.get("type") or self.get("pet_type")
        return tag.value if tag is not None and isinstance(tag.value, str) else None


@dataclass(frozen=True)
class Problem:
    """One thing wrong: where it was written, the key's dotted path, what is wrong and the way out."""

    where: str
    key: str
    what: str

    def __str__(self) -> str:
        if not self.key or self.where.removeprefix("--") == self.key:  # a flag that is the key's own path
            return f"{self.where}: {self.what}"
        return f"{self.where}: {self.key}: {self.what}"


@dataclass
class Problems:
    """Everything found wrong so far; reported together."""

    found: list[Problem] = field(default_factory=list)

    def add(self, where: str, key: str, what: str) -> None:
        problem = Problem(where, key, what)
        if problem not in self.found:
            self.found.append(problem)

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        """A line each: those of a file together, in the order of its lines, then those of the command line."""
        return "\n".join(str(problem) for problem in sorted(self.found, key=_place))


def _place(problem: Problem) -> tuple[bool, str, int]:
    file, _, line = problem.where.rpartition(":")
    if problem.where.startswith("--") or not line.isdigit():
        return True, "", 0
    return False, file, int(line)


def join(path: str, key: str | int) -> str:
    """The dotted path of an entry: `callbacks.1.prefix`."""
    return f"{path}.{key}" if path else str(key)


def plain(node: Node) -> Any:
    """The values alone: dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def lift(value: Any, origin: Origin) -> Node:
    """Plain values as a tree, all from one origin."""
    if isinstance(value, dict):
        return Node({key: lift(child, origin) for key, child in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([lift(child, origin) for child in value], origin)
    return Node(value, origin)


def merge(base: Node, over: Node) -> Node:
    """Lay `over` on `base`: mappings are merged key by key; anything else, lists included, replaces what was there."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.origin)


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Every scalar, empty mapping and empty list, with its dotted path."""
    if isinstance(node.value, dict) and node.value:
        for key, child in node.value.items():
            yield from leaves(child, join(path, key))
    elif isinstance(node.value, list) and node.value:
        for index, child in enumerate(node.value):
            yield from leaves(child, join(path, index))
    else:
        yield path, node


def find(root: Node, path: str) -> Node | None:
    """The node at a dotted path, or None."""
    node = root
    for part in path.split(".") if path else ():
        if isinstance(node.value, dict):
            child = node.value.get(part)
        elif isinstance(node.value, list) and part.isdigit() and int(part) < len(node.value):
            child = node.value[int(part)]
        else:
            child = None
        if child is None:
            return None
        node = child
    return node


def nearest_origin(root: Node, path: str) -> Origin:
    """The origin of the deepest node that exists on the way to `path`."""
    node = find(root, path)
    while node is None and path:
        path = path.rpartition(".")[0]
        node = find(root, path)
    return (node or root).origin
