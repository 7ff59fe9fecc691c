"""From a path or a name to a tokenizer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llm_core.errors import UserError
from llm_core.text.tokenizer import Tokenizer

FILE_NAMES = ("tokenizer.model", "tokenizer.json")


def tokenizer_folder() -> Path:
    """Where names are looked up: $RUN_LLM_TOKENIZERS, else ~/.cache/run_llm/tokenizers."""
    named = os.environ.get("RUN_LLM_TOKENIZERS")
    return Path(named) if named else Path.home() / ".cache" / "run_llm" / "tokenizers"


def load_tokenizer(path_or_name: str | Path, *, add_bos: bool = True, add_eos: bool = False) -> Tokenizer:
    """Load a SentencePiece model (.model) or a Hugging Face tokenizer.json.

    `path_or_name` is such a file, a folder that holds tokenizer.model or tokenizer.json (the former wins), or
    a name: NAME/tokenizer.model, NAME/tokenizer.json or NAME.model in `tokenizer_folder()`; a name like
    llama2_7b also finds llama2. `add_bos` and `add_eos` are the policy of `encode_prompt`. Raises UserError
    for a file that is missing, empty, unreadable or no tokenizer.
    """
    path = find_tokenizer_file(path_or_name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    if not content:
        raise UserError(f"{path}: the tokenizer file is empty (0 bytes); copy it again")
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the tokenizer itself; run `git lfs pull`")
    if path.suffix == ".json":
        from llm_core.text.hf import HfTokenizer as kind
    else:
        from llm_core.text.spm import SentencePieceTokenizer as kind
    tokenizer = kind(path, content)
    tokenizer.fingerprint = hashlib.sha256(content).hexdigest()
    tokenizer.add_bos, tokenizer.add_eos = add_bos, add_eos
    return tokenizer


def find_tokenizer_file(path_or_name: str | Path) -> Path:
    """The file that `load_tokenizer` would load. Raises UserError that lists the places looked at."""
    given = Path(path_or_name).expanduser()
    if not str(path_or_name).strip():
        raise UserError("no tokenizer was named: give a tokenizer.model or tokenizer.json, or its folder")
    if given.is_file():
        return given
    if given.is_dir():
        for name in FILE_NAMES:
            if (given / name).is_file():
                return given / name
        raise UserError(f"{given}: holds no {' and no '.join(FILE_NAMES)}; name the tokenizer file itself")
    if given.is_absolute() or len(given.parts) > 1 or given.suffix in (".model", ".json"):
        raise UserError(f"{given}: no such tokenizer file; give a tokenizer.model or tokenizer.json")
    return _find_by_name(str(given))


def _find_by_name(name: str) -> Path:
    folder = tokenizer_folder()
    names = dict.fromkeys([name, name.rsplit("_", 1)[0]])
    suffixes = (*(f"/{file_name}" for file_name in FILE_NAMES), ".model")
    candidates = [folder / (n + suffix) for n in names for suffix in suffixes]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"{name}: neither a file nor a tokenizer in {folder}; give a path, or put the file there as "
        f"{candidates[0]} (the folder can be changed with the environment variable RUN_LLM_TOKENIZERS)"
    )
