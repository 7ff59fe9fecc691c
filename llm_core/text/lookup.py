"""From a path or a name to a tokenizer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llm_core.errors import UserError
from llm_core.text.folder import FILE_NAMES, MODEL, adds_ends, tokenizer_file
from llm_core.text.tokenizer import Tokenizer


def tokenizer_folder() -> Path:
    """Where names are looked up: $RUN_LLM_TOKENIZERS, else ~/.cache/run_llm/tokenizers."""
    named = os.environ.get("RUN_LLM_TOKENIZERS")
    return Path(named) if named else Path.home() / ".cache" / "run_llm" / "tokenizers"


def load_tokenizer(
    path_or_name: str | Path, *, add_bos: bool | None = None, add_eos: bool | None = None
) -> Tokenizer:
    """Load a SentencePiece model (.model) or a Hugging Face tokenizer.json.

    `path_or_name` is such a file, a folder that holds one (`folder.tokenizer_file` says which), or a name: a folder
    NAME or a file NAME.model in `tokenizer_folder()`; a name like llama2_7b also finds llama2. What Hugging Face's
    files beside it say counts. `add_bos` and `add_eos` are the policy of prompts and documents; None: as Hugging Face
    begins and ends a text with it. Raises UserError for a file that is missing, empty, unreadable or no tokenizer.
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
        from llm_core.text.spm_model import with_added_tokens

        content = with_added_tokens(path, content)
    tokenizer = kind(path, content)
    tokenizer.fingerprint = hashlib.sha256(content).hexdigest()
    said = zip((add_bos, add_eos), adds_ends(path), tokenizer.adds_ends(), strict=True)
    tokenizer.add_bos, tokenizer.add_eos = (next(each for each in ways if each is not None) for ways in said)
    return tokenizer


def find_tokenizer_file(path_or_name: str | Path) -> Path:
    """The file that `load_tokenizer` would load. Raises UserError that lists the places looked at."""
    given = Path(path_or_name).expanduser()
    if not str(path_or_name).strip():
        raise UserError("no tokenizer was named: give a tokenizer.model or tokenizer.json, or its folder")
    if given.is_file():
        return given
    if given.is_dir():
        file = tokenizer_file(given)
        if file is not None:
            return file
        raise UserError(f"{given}: holds no {' and no '.join(FILE_NAMES)}; name the tokenizer file itself")
    if given.is_absolute() or len(given.parts) > 1 or given.suffix in (".model", ".json"):
        raise UserError(f"{given}: no such tokenizer file; give a tokenizer.model or tokenizer.json")
    return _find_by_name(str(given))


def _find_by_name(name: str) -> Path:
    folder = tokenizer_folder()
    names = dict.fromkeys([name, name.rsplit("_", 1)[0]])
    for each in names:
        found = tokenizer_file(folder / each) or folder / f"{each}.model"
        if found.is_file():
            return found
    raise UserError(
        f"{name}: neither a file nor a tokenizer in {folder}; give a path, or put the file there as "
        f"{folder / name / MODEL} (the folder can be changed with the environment variable RUN_LLM_TOKENIZERS)"
    )
