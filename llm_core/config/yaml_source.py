"""Reading YAML safely, with the line of every key.

Differences from `yaml.safe_load`: a duplicate key is an error that names both lines, "1e-5" is a number (YAML 1.1 reads
it as text), dates stay text, and no tag but the plain ones is accepted. Anchors, aliases and merge keys work.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llm_core.config.tree import Node, Origin, Problems, plain
from llm_core.errors import EnvironmentFault, UserError

_TAG = "tag:yaml.org,2002:"
_MAX_NODES = 100_000  # a few aliases of aliases can stand for billions of values
_MAX_DEPTH = 100  # libyaml's composer is recursive: deep enough nesting ends the process


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, with numbers as people write them."""


# Own tables: those of the parent class are shared by every user of pyyaml in the process.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TAG + "float", _TAG + "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"""[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?$
        |[-+]?(?:[0-9][0-9_]*)[eE][-+]?[0-9]+$
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$
        |[-+]?\.(?:inf|Inf|INF)$
        |\.(?:nan|NaN|NAN)$""",
        re.X,
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """A command line value as YAML reads it: `1e-5`, `true`, `[1, 2]`, `null`; what is no YAML is text.

    `None` is None here: people type Python on a command line.
    """
    if text.strip() == "None":
        return None
    problems = Problems()
    try:
        root = _compose(Path("value"), text)
        value = plain(_Converter(Path("value"), 0, problems).convert(root)) if root is not None else ""
    except UserError:
        return text
    return text if problems else value


def read_yaml(path: Path, rank: int, problems: Problems) -> Node:
    """Read one file into a tree; its problems are added to `problems`.

    Raises UserError when the file is missing, is no text, is no YAML, or is no mapping: then it has no keys to check.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error.strerror}") from None
    root = _compose(path, text)
    if root is None or not isinstance(root, yaml.MappingNode):
        found = {"SequenceNode": "a list", "NoneType": "empty"}.get(type(root).__name__, "a single value")
        raise UserError(
            f"{path}:1: a run file is a mapping of sections (model: ..., runner_config: ...); this one is {found}"
        )
    return _Converter(path, rank, problems).convert(root)


def _compose(path: Path, text: str) -> yaml.Node | None:
    loader = None
    try:
        _check_depth(path, text)
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1 if isinstance(error.position, int) else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.reason}") from None
    except ValueError as error:
        raise UserError(f"{path}:1: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise UserError(f"{path}:{event.start_mark.line + 1}: nested deeper than {_MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Converter:
    """Turns pyyaml's nodes into ours, refusing duplicate keys, foreign tags, cycles and floods of aliases."""

    def __init__(self, path: Path, rank: int, problems: Problems) -> None:
        self.path, self.rank, self.problems = path, rank, problems
        self.count = 0
        self.open: set[int] = set()  # the collections we are inside of, to notice an alias to one of them

    def convert(self, node: yaml.Node, origin: Origin | None = None) -> Node:
        origin = origin or self.origin(node)
        self.count += 1
        if self.count > _MAX_NODES:
            raise UserError(f"{self.path}: more than {_MAX_NODES} values once its aliases are written out")
        if isinstance(node, yaml.ScalarNode):
            return Node(self.scalar(node), origin)
        if id(node) in self.open:
            raise UserError(f"{origin.where}: an alias to the section it stands in")
        if len(self.open) > _MAX_DEPTH:  # aliases of aliases
            raise UserError(f"{origin.where}: nested deeper than {_MAX_DEPTH} levels")
        self.open.add(id(node))
        if not node.tag.startswith(_TAG) or node.tag.removeprefix(_TAG) not in ("map", "seq"):
            self.problems.add(origin.where, "", f"the tag {_short(node.tag)} is not allowed here")
        if isinstance(node, yaml.MappingNode):
            value: Any = self.mapping(node)
        else:
            value = [self.convert(item) for item in node.value]
        self.open.discard(id(node))
        return Node(value, origin)

    def mapping(self, node: yaml.MappingNode) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            origin = self.origin(key_node)
            if key_node.tag == _TAG + "merge":
                for name, child in self.merged(value_node).items():
                    merged.setdefault(name, child)
                continue
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag in (_TAG + "null", _TAG + "binary"):
                self.problems.add(origin.where, "", "a key must be a word")
            elif key in own:
                first = own[key].origin.where
                self.problems.add(origin.where, key, f"duplicate key, first given at {first}; keep one of them")
            else:
                own[key] = self.convert(value_node, origin)
        return {**merged, **own}

    def merged(self, node: yaml.Node) -> dict[str, Node]:
        """What a merge key `<<:` brings in; of several mappings the first that has a key wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Node] = {}
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                self.problems.add(self.origin(node).where, "<<", "a merge key takes a mapping, or a list of them")
                continue
            converted = self.convert(source)
            for name, child in converted.value.items():
                result.setdefault(name, child)
        return result

    def scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else ""
        text = node.value
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return yaml.constructor.SafeConstructor.bool_values[text.lower()]
            if kind == "int":
                return _parse_int(text)
            if kind == "float":
                lowered = text.replace("_", "").lower()
                return float(lowered.replace(".inf", "inf").replace(".nan", "nan"))
            if kind == "str":
                return text
        except (KeyError, ValueError):
            self.problems.add(self.origin(node).where, "", f"{text!r} is no {kind}")
            return None
        self.problems.add(self.origin(node).where, "", f"the tag {_short(node.tag)} is not allowed here")
        return None

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(f"{self.path}:{node.start_mark.line + 1}", self.rank)


def _parse_int(text: str) -> int:
    """YAML 1.1's integers, except that `010` is ten and `1:30` is refused: nobody means octal or base 60."""
    digits = text.replace("_", "").lower()
    base = {"0x": 16, "0b": 2, "0o": 8}.get(digits.lstrip("+-")[:2], 10)
    return int(digits, base)


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")
