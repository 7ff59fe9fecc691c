"""Chat templates in Jinja, as Hugging Face folders carry them: found, compiled in a sandbox, and filled in.

The environment gives a template what transformers' apply_chat_template gives it: trimmed blocks, loop controls,
raise_exception, strftime_now, a tojson that keeps letters, the tag {% generation %}, and the tokenizer's special tokens
as bos_token and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_core.errors import UserError
from llm_core.text.folder import CONFIG, read_json, special_names
from llm_core.text.pieces import mark_generation
from llm_core.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"


class ChatTemplate:
    """One compiled template. `source` names its file in errors; `text` is what stands there."""

    def __init__(self, text: str, source: Path, special_names: Mapping[str, Any]) -> None:
        """UserError with the line for a template that is no Jinja."""
        self.text, self.source = text, source
        self._special_names = dict(special_names)
        try:
            self._template = _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise UserError(f"{source}: the chat template's line {error.lineno} is wrong: {error.message}") from None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """What the template writes of [{"role", "content"}]. UserError with the template's own words if it refuses."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_names,
            )
        except TemplateError as error:
            raise UserError(f"{self.source}: the chat template refuses this conversation: {error}") from None
        except Exception as error:  # a template is a program, and may fail in every way in which Python does
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.source}: the chat template fails on this conversation: {reason}") from None


def load_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a file, or of a folder that holds chat_template.jinja or a tokenizer_config.json with one.

    A .json file holds it under "chat_template", as tokenizer_config.json does.

    The special tokens' names come from the files beside the template, then from those beside the tokenizer, then from
    the tokenizer itself. UserError if there is no template.
    """
    folder = path if path.is_dir() else path.parent
    source, text = _find(path)
    names: dict[str, str | None] = _own_names(tokenizer)
    for place in dict.fromkeys([tokenizer.path.parent, folder]):
        names |= special_names(place)
    return ChatTemplate(text, source, {key: name for key, name in names.items() if name is not None})


def template_file(path: Path) -> Path:
    """The file in which the template of `path`, a file or a folder, stands. UserError for a folder without one."""
    if not path.is_dir():
        return path
    for file in (path / TEMPLATE_FILE, path / CONFIG):
        if file.is_file():
            return file
    raise UserError(f"{path}: has no chat template: neither {TEMPLATE_FILE} nor {CONFIG} is there")


def _find(path: Path) -> tuple[Path, str]:
    path = template_file(path)
    if path.suffix != ".json":
        return path, _read(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder or a file with a chat template")
    template = read_json(path).get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise UserError(f"{path}: has no chat_template; name another folder, a .jinja file or a fastchat template")
    return path, template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder or a file with a chat template") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the chat template: {error.strerror}") from error


def _own_names(tokenizer: Tokenizer) -> dict[str, Any]:
    """bos_token and so on as the vocabulary spells them."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    return {name: tokenizer.id_to_piece(token) for name, token in ids.items() if token >= 0}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: what is inside is the assistant's; it comes out between marks."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.CallBlock:
        """See jinja2.ext.Extension."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return mark_generation(caller())
