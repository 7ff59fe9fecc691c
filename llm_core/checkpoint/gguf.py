"""GGUF files of the Llama architecture, as llama.cpp writes them, opened under MindFormers' names.

The `gguf` package (extra [gguf]; numpy alone) parses the file and knows how quantized blocks are laid out. llama.cpp
rotates interleaved pairs where MindFormers and Hugging Face rotate halves, so rows of wq and wk are reordered.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_core.checkpoint.dtypes import BY_NAME, Head
from llm_core.checkpoint.gguf_config import hf_config
from llm_core.checkpoint.meta_llama import interleaved_to_halves
from llm_core.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

_MAGIC = b"GGUF"
_LFS_POINTER = b"version https://git-lfs"

_TOP = {
    "token_embd.weight": "model.tok_embeddings.embedding_weight",
    "output_norm.weight": "model.norm_out.weight",
    "output.weight": "lm_head.weight",
}
_LEAVES = {
    "attn_norm.weight": "attention_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
}
for _theirs, _ours in (("q", "wq"), ("k", "wk"), ("v", "wv"), ("output", "wo")):
    _LEAVES |= {f"attn_{_theirs}.{kind}": f"attention.{_ours}.{kind}" for kind in ("weight", "bias")}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"  # of Llama 3.1's scaled positions; gguf_config turns them into rope_scaling

# what a tensor of each element type becomes; quantized ones become the float32 numbers that they stand for
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class GgufFile:
    """A GGUF file opened for reading, as one TensorFile. `heads` has MindFormers' names.

    fields: the file's metadata (`general.architecture`, `tokenizer.ggml.tokens` ...), lists as Python lists.
    metadata: the config.json that these weights need, as `checkpoint.convert` looks for it.
    UserError for a file that is cut short, of another architecture, or of an element type that is not known.
    """

    def __init__(self, path: Path):
        self.path = path
        reader, self.fields = _open_reader(path)
        _refuse_foreign(path, self.fields)
        self._tensors: dict[str, Any] = {}
        self.heads: dict[str, Head] = {}
        rope_factors = None
        for tensor in reader.tensors:
            if tensor.name == _ROPE_FACTORS:
                rope_factors = np.array(tensor.data, np.float32)
                continue
            name = self._our_name(tensor.name)
            self._tensors[name] = tensor
            self.heads[name] = Head(self._dtype(tensor), tuple(int(n) for n in reversed(tensor.shape)))
        config = hf_config(self.fields, self.heads, rope_factors, str(path))
        self._rotated = {"wq": config["num_attention_heads"], "wk": config["num_key_value_heads"]}
        self.metadata = {"hf_config": json.dumps(config)}

    def _our_name(self, theirs: str) -> str:
        layer = _LAYER.fullmatch(theirs)
        if layer and layer[2] in _LEAVES:
            return f"model.layers.{layer[1]}.{_LEAVES[layer[2]]}"
        if theirs in _TOP:
            return _TOP[theirs]
        raise UserError(f"{self.path}: tensor {theirs} belongs to no Llama that is supported")

    def _dtype(self, tensor: Any):
        kind = tensor.tensor_type.name
        if kind not in _PLAIN and kind not in _QUANTIZED:
            known = ", ".join((*_PLAIN, *_QUANTIZED))
            raise UserError(f"{self.path}: tensor {tensor.name} has element type {kind}; supported are {known}")
        return BY_NAME[_PLAIN.get(kind, "float32")]

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a new array: quantized and bfloat16 ones as float32, the others in their own type."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        stored = tensor.tensor_type.name in ("F32", "F16")
        values = np.array(tensor.data if stored else dequantize(tensor.data, tensor.tensor_type))
        projection = name.split(".")[-2]
        if projection not in self._rotated:
            return values
        rows = values.reshape(len(values), -1)  # a bias is one column
        return interleaved_to_halves(rows, self._rotated[projection]).reshape(values.shape)

    def verify(self) -> None:
        """Nothing to check: a GGUF file carries no checksum."""

    def close(self) -> None:
        self._tensors.clear()  # the file is mapped into memory until its last tensor is gone


def _open_reader(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """The package's reader of `path`, and the metadata; UserError, naming the file, for what cannot be read."""
    with open(path, "rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise UserError(f"{path}: a Git LFS pointer, not the weights themselves; run `git lfs pull`")
    if not start.startswith(_MAGIC):
        raise UserError(f"{path}: not a GGUF file")
    try:
        from gguf import GGUFEndian, GGUFReader
    except ImportError:
        raise UserError(f"{path}: reading GGUF needs the package gguf: pip install gguf, or run_llm[gguf]") from None
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise UserError(f"{path}: a big-endian GGUF; turn it round with gguf-convert-endian, of the gguf package")
    return reader, fields


def _unreadable(path: Path, error: Exception) -> UserError:
    unknown = re.match(r"(\d+) is not a valid GGML", str(error))
    if unknown:
        return UserError(
            f"{path}: a tensor has element type {unknown[1]}, which the installed gguf package does not know; "
            "take a file of another quantization (Q4_K, Q8_0 ...), or a newer gguf"
        )
    if "appears to be version" in str(error):
        return UserError(f"{path}: {str(error).removeprefix('Sorry, ')}; convert it anew with a current llama.cpp")
    return UserError(f"{path}: the file is cut short or damaged ({error}); copy it again")


def _refuse_foreign(path: Path, fields: dict[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: general.architecture: {architecture!r} is not supported; it must be 'llama'")
    parts = fields.get("split.count") or 1
    if parts > 1:
        raise UserError(f"{path}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART WHOLE")
