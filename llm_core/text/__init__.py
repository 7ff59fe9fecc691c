"""Text <-> token ids: SentencePiece and Hugging Face tokenizers behind one interface; prompt templates."""

from llm_core.text.lookup import load_tokenizer
from llm_core.text.tokenizer import TextStream, Tokenizer

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]
