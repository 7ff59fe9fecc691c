"""The schema as a map of keys: which are known where, and which is nearest to a misspelt one."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic.fields import FieldInfo

from llm_core.config.inert import INERT, inert_entry, is_inert_section
from llm_core.config.section import Section
from llm_core.config.tree import Node, Problems, join, plain

TAGS = ("type", "pet_type")


@dataclass(frozen=True)
class Shape:
    """What may stand at a key: sections by type name (None = the only one), in a list or not, and plain types."""

    sections: dict[str | None, type[Section]]
    in_list: bool
    scalars: tuple[Any, ...]

    def section_for(self, node: Node) -> type[Section] | None:
        """The section that a mapping is; None when its type is missing or unknown."""
        if None in self.sections:
            return self.sections[None]
        return self.sections.get(node.type_name())


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """The section's fields by the names that stand in the YAML."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


@cache
def shapes_of(section: type[Section]) -> dict[str, Shape]:
    """What may stand at each key of a section."""
    return {name: _shape(info.annotation) for name, info in fields_of(section).items()}


def _shape(annotation: Any) -> Shape:
    parts = list(_parts(annotation))
    in_list = any(typing.get_origin(part) is list and _sections(part) for part in parts)
    classes = [cls for part in parts for cls in _sections(part)]
    if len(classes) == 1:
        sections: dict[str | None, type[Section]] = {None: classes[0]}
    else:
        sections = {tag: cls for cls in classes for tag in _tags(cls)}
    scalars = tuple(part for part in parts if not _sections(part))
    return Shape(sections, in_list, scalars)


def _parts(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, seen through Annotated."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _parts(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def _sections(part: Any) -> list[type[Section]]:
    if isinstance(part, type) and issubclass(part, Section):
        return [part]
    if typing.get_origin(part) is list:
        return [cls for inner in _parts(typing.get_args(part)[0]) for cls in _sections(inner)]
    return []


def _tags(cls: type[Section]) -> tuple[str, ...]:
    """The type names that select this section in a union."""
    for tag in TAGS:
        if tag in cls.model_fields:
            return typing.get_args(cls.model_fields[tag].annotation)
    return ()


def is_text(shape: Shape) -> bool:
    """Whether a command line value stands here as it was typed: text, and neither number nor truth value."""
    kinds = {_kind(part) for part in shape.scalars}
    return str in kinds and not kinds & {bool, int, float, list, dict} and not shape.sections


def takes_bool(shape: Shape) -> bool:
    """Whether true and false may stand here."""
    return any(_kind(part) is bool or part is Any for part in shape.scalars)


def _kind(part: Any) -> Any:
    if typing.get_origin(part) is Literal:
        return type(typing.get_args(part)[0])
    return typing.get_origin(part) or part


def shape_at(root: type[Section], tree: Node, path: str) -> Shape | None:
    """What may stand at a dotted path, following the type names that `tree` gives; None when it is unknown."""
    section, node = root, tree
    shape: Shape | None = None
    for part in path.split("."):
        if shape is not None and shape.in_list and part.isdigit():
            items = node.value if node is not None and isinstance(node.value, list) else []
            node = items[int(part)] if int(part) < len(items) else None
        else:
            if shape is not None:
                section = shape.section_for(node) if node is not None else shape.sections.get(None)
            shape = shapes_of(section).get(part) if section is not None else None
            node = node.get(part) if node is not None else None
        if shape is None:
            return None
    return shape


# ---- walking a tree ----


def prune(root: type[Section], tree: Node, problems: Problems) -> tuple[Node, dict[str, str]]:
    """Take out what the schema does not know: inert keys, and keys of a section's former type.

    Unknown keys are added to `problems`, with the nearest known one. Returns the tree without them, and the inert keys
    that were seen, each with its reason.
    """
    seen: dict[str, str] = {}
    pruned = _prune_section(root, tree, "", "", problems, seen)
    return pruned, seen


def _prune_section(
    section: type[Section], node: Node, path: str, generic: str, problems: Problems, seen: dict[str, str]
) -> Node:
    """`path` names list items by number, `generic` by type."""
    if not isinstance(node.value, dict):
        return node  # pydantic says what should stand here
    shapes = shapes_of(section)
    kept: dict[str, Node] = {}
    for name, child in node.value.items():
        child_path, child_generic = join(path, name), join(generic, name)
        entry = inert_entry(child_generic)
        if name in shapes:
            kept[name] = _prune_value(shapes[name], child, child_path, child_generic, problems, seen)
        elif entry is not None:
            _note_inert(child, child_path, entry, problems, seen)
        elif is_inert_section(child_generic):
            _prune_inert_section(child, child_path, child_generic, problems, seen)
        elif not _belongs_to_former_type(section, node, child, name):
            problems.add(child.origin.where, child_path, "unknown key" + nearest_key(name, section, child_path))
    return Node(kept, node.origin)


def _prune_value(shape: Shape, node: Node, path: str, generic: str, problems: Problems, seen: dict[str, str]) -> Node:
    if isinstance(node.value, bool) and not takes_bool(shape) and shape.scalars:
        problems.add(node.origin.where, path, f"{node.value} is no {_names(shape)}")
    if not shape.sections:
        return node
    if isinstance(node.value, list) and shape.in_list:
        items = []
        for index, item in enumerate(node.value):
            item_generic = f"{generic}[{item.type_name()}]"
            item_path = join(path, index)
            entry = inert_entry(item_generic)
            if entry is not None:
                _note_inert(item, f"{path}[{item.type_name()}]", entry, problems, seen)
                continue
            section = shape.section_for(item)
            items.append(_prune_section(section, item, item_path, item_generic, problems, seen) if section else item)
        return Node(items, node.origin)
    section = shape.section_for(node)
    return _prune_section(section, node, path, generic, problems, seen) if section else node


def _note_inert(node: Node, path: str, entry: Any, problems: Problems, seen: dict[str, str]) -> None:
    value = plain(node)
    if entry.allows(value):
        seen[path] = entry.reason
    else:
        allowed = " or ".join(repr(each) for each in entry.only)
        problems.add(
            node.origin.where, path, f"{value!r} is not supported ({entry.reason}); use {allowed}, or leave it out"
        )


def _prune_inert_section(node: Node, path: str, generic: str, problems: Problems, seen: dict[str, str]) -> None:
    for name, child in node.value.items() if isinstance(node.value, dict) else ():
        entry = inert_entry(join(generic, name))
        if entry is not None:
            _note_inert(child, join(path, name), entry, problems, seen)


def _belongs_to_former_type(section: type[Section], node: Node, child: Node, name: str) -> bool:
    """Whether a later layer changed the section's type and this key is the former type's: then it falls away."""
    tag = node.get("type") or node.get("pet_type")
    if tag is None or tag.origin.rank <= child.origin.rank:
        return False
    return any(name in fields_of(other) for other in _siblings(section))


@cache
def _siblings(section: type[Section]) -> tuple[type[Section], ...]:
    for shape in _all_shapes():
        if section in shape.sections.values():
            return tuple(shape.sections.values())
    return ()


@cache
def _all_shapes() -> tuple[Shape, ...]:
    from llm_core.config.schema import RunConfig

    found: list[Shape] = []
    pending: list[type[Section]] = [RunConfig]
    done: set[type[Section]] = set()
    while pending:
        section = pending.pop()
        if section in done:
            continue
        done.add(section)
        for shape in shapes_of(section).values():
            found.append(shape)
            pending.extend(shape.sections.values())
    return tuple(found)


def _names(shape: Shape) -> str:
    kinds = [getattr(_kind(part), "__name__", str(part)) for part in shape.scalars if part is not type(None)]
    words = {"int": "whole number", "float": "number", "str": "text", "dict": "mapping"}
    return " or ".join(dict.fromkeys(words.get(kind, kind) for kind in kinds))


# ---- every key of the schema ----


def all_keys(section: type[Section] | None = None, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key, as the command line writes it: `runner_config.epochs`, `callbacks[CheckpointMonitor].prefix`.

    A key that several types of a section have comes once for each.
    """
    if section is None:
        from llm_core.config.schema import RunConfig as section
    shapes = shapes_of(section)
    for name, info in fields_of(section).items():
        shape, child = shapes[name], join(path, name)
        yield child, info
        for tag, cls in shape.sections.items():
            yield from all_keys(cls, f"{child}[{tag}]" if shape.in_list and tag else child)


def nearest_key(name: str, section: type[Section] | None, path: str) -> str:
    """'; did you mean ...?' for a misspelt key: the section's own keys first, then every path."""
    if section is not None:
        prefix = path.removesuffix(name)
        own = difflib.get_close_matches(name, fields_of(section), 1, 0.75)
        if own:
            return f"; did you mean {prefix}{own[0]}?"
    paths = [known for known, _ in all_keys()] + [known for known in INERT if "*" not in known]
    same_leaf = [known for known in paths if known.rpartition(".")[2] == name]
    if same_leaf:
        return f"; did you mean {same_leaf[0]}?"
    near = difflib.get_close_matches(path, paths, 1, 0.75)
    if not near:
        by_leaf = {known.rpartition(".")[2]: known for known in reversed(paths)}
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(name, by_leaf, 1, 0.75)]
    if near:
        return f"; did you mean {near[0]}?"
    if section is not None:
        own = difflib.get_close_matches(name, fields_of(section), 1, 0.5)
        if own:
            return f"; did you mean {path.removesuffix(name)}{own[0]}?"
    return ""
