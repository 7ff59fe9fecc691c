"""One door to the weight files of every format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from llm_core.checkpoint.ckpt_file import CkptFile, ckpt_size, write_ckpt
from llm_core.checkpoint.dtypes import Head
from llm_core.checkpoint.gguf import GgufFile
from llm_core.checkpoint.safetensors_file import SafetensorsFile, safetensors_size, write_safetensors
from llm_core.checkpoint.staged import StagedFile
from llm_core.checkpoint.torch_file import TorchFile
from llm_core.errors import UserError

_READERS = {
    ".safetensors": SafetensorsFile, ".ckpt": CkptFile, ".gguf": GgufFile,
    ".bin": TorchFile, ".pth": TorchFile, ".pt": TorchFile,
}  # fmt: skip
WRITABLE = (".safetensors", ".ckpt")


class TensorFile(Protocol):
    """An open weight file: what is in it (`heads`) is known at once, the values are read one tensor at a time."""

    path: Path
    heads: dict[str, Head]
    metadata: dict[str, str]

    def read(self, name: str) -> np.ndarray: ...

    def verify(self) -> None: ...

    def close(self) -> None: ...


def is_weight_file(path: Path) -> bool:
    """Whether a file found in a folder is meant to hold weights: PyTorch's suffixes are used for much else, such as
    training_args.bin, so there the name must say so, too. (Temporary files are hidden.)"""
    if path.suffix in WRITABLE:
        return not path.name.startswith(".")
    return path.suffix in _READERS and path.name.startswith(("pytorch_model", "consolidated."))


def open_tensor_file(path: Path) -> TensorFile:
    """Open a weight file by its suffix. UserError when it is missing, unreadable, damaged or of no known kind."""
    if path.suffix not in _READERS:
        raise UserError(f"{path}: not a weight file; known are {', '.join(_READERS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return _READERS[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def file_size(suffix: str, heads: Mapping[str, Head], metadata: Mapping[str, str]) -> int:
    """Bytes that `write_tensors` will write."""
    return ckpt_size(heads) if suffix == ".ckpt" else safetensors_size(heads, metadata)


def write_tensors(
    staged: StagedFile, heads: Mapping[str, Head], read: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a weight file of the kind that `staged.target` names, a tensor at a time (a .ckpt has no metadata)."""
    if staged.target.suffix == ".ckpt":
        write_ckpt(staged, heads, read)
    else:
        write_safetensors(staged, heads, read, metadata)
    staged.finish()


def read_heads(path: str | Path) -> dict[str, Head]:
    """Names, element types and shapes of one weight file, without its values."""
    file = open_tensor_file(Path(path))
    file.close()
    return file.heads
