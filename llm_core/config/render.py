"""A tree written as YAML again, with where each value came from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import yaml

from llm_core.config import keys
from llm_core.config.schema import RunConfig
from llm_core.config.section import Section
from llm_core.config.tree import Node, Origin, lift

_DEFAULT = Origin("default", -1)
_COMMENT_COLUMN = 60


def as_yaml(tree: Node, *, origins: bool = False, defaults: bool = False) -> str:
    """The tree as YAML text, in the schema's order; see LoadedConfig.as_yaml."""
    if defaults:
        tree = _with_defaults(RunConfig, tree)
    order = list(keys.fields_of(RunConfig))
    entries = sorted(tree.value.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    lines = _mapping(dict(entries), "")
    return "\n".join(_commented(text, origin if origins else None) for text, origin in lines) + "\n"


def _commented(text: str, origin: Origin | None) -> str:
    return f"{text:<{_COMMENT_COLUMN}}  # {origin.where}" if origin is not None else text


def _mapping(entries: dict[str, Node], indent: str) -> Iterator[tuple[str, Origin | None]]:
    for name, node in entries.items():
        key = _scalar(name)
        if isinstance(node.value, dict) and node.value:
            yield f"{indent}{key}:", None
            yield from _mapping(node.value, indent + "  ")
        elif isinstance(node.value, list) and any(isinstance(item.value, dict | list) for item in node.value):
            yield f"{indent}{key}:", None
            for item in node.value:
                yield from _item(item, indent + "  ")
        else:
            yield f"{indent}{key}: {_flow(node)}", node.origin


def _item(node: Node, indent: str) -> Iterator[tuple[str, Origin | None]]:
    if not (isinstance(node.value, dict) and node.value):
        yield f"{indent}- {_flow(node)}", node.origin
        return
    for index, (text, origin) in enumerate(_mapping(node.value, indent + "  ")):
        yield (f"{indent}- {text.lstrip()}" if index == 0 else text), origin


def _flow(node: Node) -> str:
    """A scalar, or a list or mapping on one line."""
    if isinstance(node.value, list):
        return "[" + ", ".join(_flow(item) for item in node.value) + "]"
    if isinstance(node.value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_flow(child)}" for key, child in node.value.items()) + "}"
    return _scalar(node.value)


@functools.cache
def _text(value: str) -> str:
    return (
        yaml.safe_dump(value, width=float("inf"), default_flow_style=True, allow_unicode=True)
        .removesuffix("...\n")
        .strip()
    )


def _scalar(value: Any) -> str:
    """A scalar that this project's loader and plain YAML 1.1 read back as the same value."""
    if isinstance(value, str):
        from llm_core.config.yaml_source import parse_value

        text = _text(value)
        plain = not text.startswith(("'", '"'))
        return (
            f"'{value}'" if plain and (not isinstance(parse_value(text), str) or set(value) & set("[]{},#")) else text
        )
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text  # YAML 1.1 wants the point
    return "null" if value is None else str(value)


def _with_defaults(section: type[Section], node: Node) -> Node:
    """The mapping with every key of its section, those that nobody set marked as defaults."""
    entries = dict(node.value) if isinstance(node.value, dict) else {}
    shapes = keys.shapes_of(section)
    for name, info in keys.fields_of(section).items():
        shape = shapes[name]
        if name not in entries:
            if info.is_required():
                continue
            entries[name] = lift(_plain_default(info.get_default(call_default_factory=True)), _DEFAULT)
        child = entries[name]
        if isinstance(child.value, list) and shape.in_list:
            items = [_with_defaults(shape.section_for(item), item) for item in child.value if shape.section_for(item)]
            entries[name] = Node(items, child.origin)
        elif isinstance(child.value, dict) and shape.section_for(child) is not None:
            entries[name] = _with_defaults(shape.section_for(child), child)
    return Node(entries, node.origin)


def _plain_default(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(by_alias=True)
    if isinstance(value, list | tuple):
        return [_plain_default(item) for item in value]
    return value
