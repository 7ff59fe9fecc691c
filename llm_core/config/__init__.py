"""Run configuration: MindFormers' YAML, checked whole, in layers. Imports no mindspore.

The names below are loaded on first use, so that `llm_core.config.hf_folder` and `llm_core.config.catalog`
stay cheap to import (pydantic alone takes a third of what `--help` may take).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_core.config.load import LoadedConfig, load_config
    from llm_core.config.schema import RunConfig

__all__ = ["LoadedConfig", "RunConfig", "load_config"]


def __getattr__(name: str) -> Any:
    if name in ("LoadedConfig", "load_config"):
        from llm_core.config import load

        return getattr(load, name)
    if name == "RunConfig":
        from llm_core.config.schema import RunConfig

        return RunConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
