"""Element types of weight files: one table of names, and bfloat16, for which numpy has no type.

In memory a bfloat16 tensor is a float32 array (every bfloat16 value is a float32 value, so nothing is lost);
on disk it is 16-bit words. `encode` and `decode` go between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llm_core.errors import UserError


@dataclass(frozen=True)
class DType:
    """One element type. `stored` is the numpy type of its words on disk, little-endian."""

    name: str
    safetensors: str
    mindspore: str
    torch_storage: str
    stored: np.dtype

    @property
    def floating(self) -> bool:
        return self.name in ("float64", "float32", "float16", "bfloat16")


_TABLE = tuple(
    DType(name, short, mindspore, storage, np.dtype(words))
    for name, short, mindspore, storage, words in (
        ("float64", "F64", "Float64", "DoubleStorage", "<f8"),
        ("float32", "F32", "Float32", "FloatStorage", "<f4"),
        ("float16", "F16", "Float16", "HalfStorage", "<f2"),
        ("bfloat16", "BF16", "BFloat16", "BFloat16Storage", "<u2"),
        ("int64", "I64", "Int64", "LongStorage", "<i8"),
        ("int32", "I32", "Int32", "IntStorage", "<i4"),
        ("int16", "I16", "Int16", "ShortStorage", "<i2"),
        ("int8", "I8", "Int8", "CharStorage", "i1"),
        ("uint64", "U64", "UInt64", "UInt64Storage", "<u8"),
        ("uint32", "U32", "UInt32", "UInt32Storage", "<u4"),
        ("uint16", "U16", "UInt16", "UInt16Storage", "<u2"),
        ("uint8", "U8", "UInt8", "ByteStorage", "u1"),
        ("bool", "BOOL", "Bool", "BoolStorage", "?"),
    )
)
BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE}
BY_MINDSPORE = {dtype.mindspore: dtype for dtype in _TABLE}
BY_TORCH_STORAGE = {dtype.torch_storage: dtype for dtype in _TABLE}

# the short names of the --dtype flags
FLAG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_FLOAT16_OVERFLOW = 65520.0  # from here on float16 rounds to infinity


@dataclass(frozen=True)
class Head:
    """What a file says of a tensor before its values are read."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.size * self.dtype.stored.itemsize


def head_of(array: np.ndarray) -> Head:
    """The head under which `array` is stored; MindSpore's own numpy bfloat16 is known by its name."""
    dtype = BY_NAME.get(array.dtype.name)
    if dtype is None:
        raise TypeError(f"arrays of type {array.dtype} cannot be stored in a checkpoint")
    return Head(dtype, tuple(array.shape))


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 [...] -> uint16 [...], the nearest bfloat16 (ties to even); NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(values.shape).view(np.uint32)
    # adding 0x7fff, or 0x8000 when the kept part is odd, carries into the kept half exactly when it must round up
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) | 0x0040).astype(np.uint16)
    return rounded


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 [...] -> float32 [...], exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decode(words: np.ndarray, dtype: DType, shape: tuple[int, ...]) -> np.ndarray:
    """Words of a file (1-D, `dtype.stored`) -> array of `shape`; bfloat16 comes out as float32."""
    array = bfloat16_values(words) if dtype.name == "bfloat16" else words
    return array.reshape(shape)


def encode(array: np.ndarray, dtype: DType) -> np.ndarray:
    """Array -> its words on disk: 1-D, contiguous, little-endian, rounded to nearest even where `dtype` is narrower.

    Contiguity is made here because the raw memory of a strided view is not its values.
    """
    if array.dtype.name == "bfloat16":
        words = np.ascontiguousarray(array).view(np.uint16)
        if dtype.name == "bfloat16":
            return words.reshape(-1)
        array = bfloat16_values(words)
    if dtype.name == "bfloat16":
        return bfloat16_bits(array.astype(np.float32, copy=False)).reshape(-1)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=dtype.stored).reshape(-1)


def check_fits(name: str, array: np.ndarray, dtype: DType) -> None:
    """Raise UserError, naming the tensor, when `dtype` is float16 and cannot hold its finite values."""
    if dtype.name != "float16" or array.dtype == np.float16 or not array.size:
        return
    finite = array[np.isfinite(array)]
    largest = float(np.abs(finite).max()) if finite.size else 0.0
    if largest >= _FLOAT16_OVERFLOW:
        raise UserError(
            f"{name}: its largest value, {largest:.6g}, is beyond float16's 65504; convert to bf16 or fp32 instead"
        )
