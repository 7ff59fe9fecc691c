"""Text <-> token ids: SentencePiece and Hugging Face tokenizers behind one interface; prompt templates.

The names below are loaded on first use, so that `llm_core.text.folder` stays cheap to import (numpy is not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_core.text.lookup import load_tokenizer
    from llm_core.text.tokenizer import TextStream, Tokenizer

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name == "load_tokenizer":
        from llm_core.text.lookup import load_tokenizer

        return load_tokenizer
    if name in ("TextStream", "Tokenizer"):
        from llm_core.text import tokenizer

        return getattr(tokenizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
