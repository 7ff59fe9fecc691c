"""What every section of the schema shares."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A mapping of the YAML: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True, allow_inf_nan=False
    )


def key(default: Any, description: str, **constraints: Any) -> Any:
    """A key with its default (`...` = required) and what it means: the text of the help and of the JSON Schema."""
    return Field(default, description=description, **constraints)
