"""The schema for editors (JSON Schema) and for people (a list of keys); both made from the same descriptions."""

from __future__ import annotations

import json
import os
import re
import tempfile
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from llm_core.config import keys
from llm_core.config.inert import INERT
from llm_core.config.schema import RunConfig
from llm_core.errors import EnvironmentFault, UserError


def json_schema() -> str:
    """JSON Schema of a run file. Keys without a meaning are allowed and marked deprecated, with the reason.

    A run file shows only what differs from its layers, so nothing is required here; the loader checks the merged whole.
    """
    schema = RunConfig.model_json_schema(by_alias=True)
    schema["title"] = "A run of run_llm"
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["base_config"] = {
        "description": "The layers under this file, lowest first; paths are relative to it.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    for name in ("metric", "predict_data", "input_data"):  # one where a list may stand
        _allow_single(schema["properties"][name])
    for path, entry in INERT.items():
        _allow_inert(schema, path, {"description": f"No meaning here: {entry.reason}.", "deprecated": True})
    for part in [schema, *schema["$defs"].values()]:
        part["required"] = [name for name in part.get("required", []) if name in keys.TAGS and "callback" in name]
        if not part["required"]:
            del part["required"]
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _allow_single(part: dict[str, Any]) -> None:
    options = part.pop("anyOf", None) or [{key: part.pop(key) for key in ("type", "items")}]
    part["anyOf"] = [*options, *(option["items"] for option in options if "items" in option)]


def _allow_inert(schema: dict[str, Any], path: str, entry: dict[str, Any]) -> None:
    """Add one key of the inert table to every section it may stand in."""
    parents = [schema]
    *parts, leaf = re.findall(r"[^.\[\]]+|\[[^\]]+\]", path)
    if leaf.startswith("["):  # a whole item of a list
        items = schema["properties"][parts[0]]["items"]
        tag = {"type": {"const": leaf.strip("[]"), **entry}}
        items["oneOf"].append({"type": "object", "properties": tag, "required": ["type"], **entry})
        return
    for part in parts:
        wanted = part.strip("[]") if part.startswith("[") else None
        found = []
        for parent in parents:
            target = parent if wanted else parent.get("properties", {}).setdefault(part, {"type": "object"})
            found += [each for each in _resolve(schema, target) if wanted is None or _has_type(each, wanted)]
        parents = found
    for parent in parents:
        if leaf == "*":
            parent["additionalProperties"] = True
        else:
            parent.setdefault("properties", {}).setdefault(leaf, entry)


def _resolve(schema: dict[str, Any], part: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections a property may be, through references, unions and lists."""
    if "$ref" in part:
        return [schema["$defs"][part["$ref"].rpartition("/")[2]]]
    inner = [*part.get("anyOf", []), *part.get("oneOf", []), *([part["items"]] if "items" in part else [])]
    if inner:
        return [each for option in inner for each in _resolve(schema, option)]
    return [part] if part.get("type") == "object" else []


def _has_type(section: dict[str, Any], name: str) -> bool:
    tag = section.get("properties", {}).get("type", {})
    return name in tag.get("enum", [tag.get("const")])


def key_list(pattern: str = "") -> str:
    """A line for every key: path, default, meaning; those that match."""
    try:
        wanted = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"-p {pattern}: no regular expression ({error})") from None
    found: dict[str, list[FieldInfo]] = {}
    for path, info in keys.all_keys():
        found.setdefault(path, []).append(info)
    lines = [_key_line(path, infos) for path, infos in found.items()]
    lines += [f"{path}  [no meaning here]  {entry.reason}" for path, entry in INERT.items()]
    lines = [line for line in lines if wanted.search(line)]
    if not lines:
        raise UserError(f"-p {pattern}: no key matches")
    return "\n".join(lines) + "\n"


def _key_line(path: str, infos: list[FieldInfo]) -> str:
    """`infos`: the key's field in each type of section that has it; the first one's default is shown."""
    first = infos[0]
    default = "required" if first.is_required() else _shown(first.get_default(call_default_factory=True))
    choices = dict.fromkeys(choice for info in infos for choice in _choices(info.annotation))
    meaning = [first.description or "", f"One of {', '.join(choices)}." if choices else ""]
    return f"{path}  [{default}]  {' '.join(part for part in meaning if part)}".rstrip()


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [choice for part in typing.get_args(annotation) for choice in _choices(part)]


def _shown(value: Any) -> str:
    if isinstance(value, keys.Section):
        return "section"
    return "null" if value is None else repr(value)


def write(name: str, text: str) -> None:
    """Write a whole file or none. Raises EnvironmentFault when the place cannot be written."""
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error.strerror}") from None
