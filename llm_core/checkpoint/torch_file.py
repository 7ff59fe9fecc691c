"""PyTorch's .bin, .pt and .pth files without torch and without running what their pickle asks for.

Such a file is a zip archive: `data.pkl` names the tensors, `data/N` holds their storages, uncompressed. The pickle
is read by an unpickler that knows exactly the names a state dict needs, and refuses every other by name.
"""

from __future__ import annotations

import collections
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import BY_TORCH_STORAGE, DType, Head, decode
from llm_core.errors import UserError

_LARGEST_PICKLE = 256 * 2**20  # names and shapes only; Llama-2 70B's have 0.1 MiB


@dataclass(frozen=True)
class _Storage:
    dtype: DType
    key: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage: offset, shape and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor, requires_grad=False, hooks=None) -> _Tensor:
    return tensor


_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("torch", name): dtype for name, dtype in BY_TORCH_STORAGE.items()},
}


class _Refused(Exception):
    pass


# what zipfile and pickle raise on damaged bytes
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OverflowError, RuntimeError,
    ValueError, TypeError, LookupError, AttributeError,
)  # fmt: skip


class _StateDictUnpickler(pickle.Unpickler):
    """Resolves the few names of a state dict, and nothing else, so that no code of the file's choice runs."""

    def find_class(self, module: str, name: str):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"it asks for {module}.{name}, which no tensor needs") from None

    def persistent_load(self, reference) -> _Storage:
        kind, dtype, key, _device, size = reference
        if kind != "storage" or not isinstance(dtype, DType):
            raise _Refused(f"it holds {reference!r}, which is no tensor storage")
        return _Storage(dtype, str(key), int(size))


class TorchFile:
    """A PyTorch state dict opened for reading. `heads` is known at once; `read(name)` reads one tensor.

    Raises UserError naming the file when it is damaged, in the form older than torch 1.6, or holds anything but
    tensors by name.
    """

    metadata: dict[str, str] = {}

    def __init__(self, path: Path):
        self.path = path
        try:
            is_zip = zipfile.is_zipfile(path)
            if is_zip:
                self._zip = zipfile.ZipFile(path)
                self._root = self._find_root()
                content = self._unpickle()
        except _Refused as error:
            raise UserError(f"{path}: not read: {error}; a file of tensors alone is expected") from None
        except _DAMAGE as error:
            raise UserError(f"{path}: damaged or no PyTorch file ({error})") from error
        if not is_zip:
            raise UserError(
                f"{path}: cut short, or in PyTorch's form of before 1.6, which is not read; "
                "load it once with torch.load(..., weights_only=True) and save it with safetensors"
            )
        self._tensors = self._state_dict(content)
        self.heads = {name: Head(t.storage.dtype, t.shape) for name, t in self._tensors.items()}

    def _find_root(self) -> str:
        pickles = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("it is a zip archive without data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in self._zip.namelist() and self._zip.read(order) != b"little":
            raise _Refused("it was written on a big-endian machine")
        return root

    def _unpickle(self):
        info = self._zip.getinfo(f"{self._root}data.pkl")
        if info.file_size > _LARGEST_PICKLE:
            raise _Refused(f"its index of {info.file_size} bytes is too large")
        with self._zip.open(info) as file:
            return _StateDictUnpickler(file).load()

    def _state_dict(self, content) -> dict[str, _Tensor]:
        if not isinstance(content, dict) or not content:
            raise UserError(f"{self.path}: holds no tensors by name (found {type(content).__name__})")
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, _Tensor):
                raise UserError(
                    f"{self.path}: entry {name!r} is no tensor; a plain state dict is expected, not a training state"
                )
            self._check_bounds(name, value)
        return dict(content)

    def _check_bounds(self, name: str, tensor: _Tensor) -> None:
        whole = (tensor.offset, *tensor.shape, *tensor.strides)
        last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        empty = 0 in tensor.shape
        if any(not isinstance(n, int) or n < 0 for n in whole) or (not empty and last >= tensor.storage.size):
            raise UserError(f"{self.path}: {name} reaches beyond its storage; the file is damaged")

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a new array (bfloat16 as float32). One storage is in memory at a time."""
        tensor = self._tensors[name]
        dtype = tensor.storage.dtype
        nbytes = tensor.storage.size * dtype.stored.itemsize
        entry = f"{self._root}data/{tensor.storage.key}"
        try:
            with self._zip.open(entry) as file:
                data = file.read(nbytes)
        except _DAMAGE as error:
            raise UserError(f"{self.path}: {name} is damaged ({error}); use another copy") from error
        if len(data) != nbytes:
            raise UserError(f"{self.path}: {name} is cut short; use another copy")
        words = np.frombuffer(data, dtype.stored)
        step = dtype.stored.itemsize
        view = np.lib.stride_tricks.as_strided(
            words[tensor.offset:], tensor.shape, [stride * step for stride in tensor.strides], writeable=False
        )
        return decode(np.ascontiguousarray(view).reshape(-1), dtype, tensor.shape)

    def verify(self) -> None:
        """Nothing to do ahead: the archive's crc of a tensor is checked when the tensor is read."""

    def close(self) -> None:
        self._zip.close()
