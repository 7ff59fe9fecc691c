"""Hugging Face tokenizer.json files (Falcon, GPT-2, Llama-3 ...), through the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from llm_core.errors import UserError
from llm_core.text.folder import special_names
from llm_core.text.tokenizer import SpecialToken, Tokenizer

# What the families call these tokens, for a tokenizer.json whose folder does not say it.
_USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
}
_REPLACEMENT = "\ufffd"


class HfTokenizer(Tokenizer):
    """A tokenizer.json. Special ids come from the files beside it (`folder.special_names`), else from usual names."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception, ValueError or a pyo3 panic type
            raise UserError(f"{path}: not a tokenizer.json, or damaged ({error}); copy it again") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # text is text: see Tokenizer
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = special_names(path.parent)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            self._special_id(kind, named) for kind in ("bos", "eos", "pad", "unk")
        )
        self._special_ids = {
            token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special
        }

    def _special_id(self, kind: str, named: Mapping[str, str | None]) -> int:
        """-1 where the folder says null, which is none. Where it says nothing, a usual name that is there."""
        key = f"{kind}_token"
        for name in [named[key]] if key in named else _USUAL_NAMES[kind]:
            token = None if name is None else self._tokenizer.token_to_id(name)
            if token is not None:
                return token
        return -1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer. (The library uses its own threads unless TOKENIZERS_PARALLELISM=false.)"""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See Tokenizer. A character that takes several tokens: each carries its span."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def id_to_piece(self, token: int) -> str:
        """See Tokenizer."""
        self._check_ids([token])
        return self._tokenizer.id_to_token(int(token)) or ""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """See Tokenizer."""
        self._check_ids(ids)
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    @property
    def special_tokens(self) -> list[SpecialToken]:
        """See Tokenizer."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [
            SpecialToken(added[token].content, (token,), added[token].lstrip, added[token].rstrip)
            for token in sorted(self._special_ids)
        ]

    @cached_property
    def inner(self) -> Tokenizer:
        """See Tokenizer. Some put a space in front of a text, but not of what follows a special token."""
        content = json.loads(self._tokenizer.to_str())
        cut = content.get("pre_tokenizer") or {}
        first_alone = [step for step in (cut, *cut.get("pretokenizers", ())) if step.get("prepend_scheme") == "first"]
        if not first_alone:
            return self
        for step in first_alone:
            step["prepend_scheme"] = "never"
        return HfTokenizer(self.path, json.dumps(content).encode())

    def adds_ends(self) -> tuple[bool, bool]:
        """See Tokenizer. The post-processor does it."""
        encoding = self._tokenizer.encode("x", add_special_tokens=True)
        text = [*encoding.special_tokens_mask, 0].index(0)
        return self.bos_id in encoding.ids[:text], self.eos_id in encoding.ids[text:]

    def stream(self) -> HfStream:
        """See Tokenizer."""
        return HfStream(self)


class HfStream:
    """See TextStream. Decodes a short window with and without the new token; the difference is new text.

    Decoders of tokenizer.json are arbitrary, so that bytes cannot be looked up; a window rather than the one
    token, because a decoder may treat the first token differently (spaces).
    """

    # A character has at most four bytes; more pending tokens than that end in bytes that no token will
    # complete.
    LONGEST_CHARACTER = 4

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the last tokens whose text is out
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """See TextStream."""
        self._tokenizer._check_ids([token])
        if int(token) in self._tokenizer._special_ids:
            return self.flush()
        self._pending.append(int(token))
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._pending) < self.LONGEST_CHARACTER:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """See TextStream."""
        return self._show(self._new_text()) if self._pending else ""

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._shown + self._pending)[len(decode(self._shown)) :]

    def _show(self, text: str) -> str:
        self._shown, self._pending = self._pending, []
        return text
