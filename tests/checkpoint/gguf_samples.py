"""Tiny GGUF files, written by the gguf package as llama.cpp's converter would write them."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 32, 256, 256, 4, 2, 2
HEAD_DIM = HIDDEN // HEADS
MATRICES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
    "ffn_up": (FFN, HIDDEN),
}
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
# where the float16 scales lie in a block of those that the package cannot quantize to
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def quantized(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A random tensor as the file stores it: uint8 blocks, or float32 and float16 as they are."""
    if kind in _SCALES:  # random blocks of reasonable scales
        block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
        blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
        for place in _SCALES[kind]:
            scale = rng.uniform(1e-5, 5e-5, (len(blocks), 1)).astype(np.float16)
            blocks[:, place : place + 2] = scale.view(np.uint8)
        return blocks.reshape(shape[0], -1)
    return gguf.quants.quantize(rng.normal(0, 0.05, shape).astype(np.float32), Type[kind])


def tensors(kind: str = "F32", tied: bool = False, bias: bool = False) -> dict[str, tuple[np.ndarray, str]]:
    """Name in the file -> (data, element type); norms and biases are F32, as always."""
    rng = np.random.default_rng(0)
    made = {"token_embd.weight": (quantized(rng, (VOCAB, HIDDEN), kind), kind)}
    for layer in range(LAYERS):
        for leaf, shape in MATRICES.items():
            made[f"blk.{layer}.{leaf}.weight"] = (quantized(rng, shape, kind), kind)
            if bias and leaf.startswith("attn"):
                made[f"blk.{layer}.{leaf}.bias"] = (rng.normal(0, 0.1, shape[0]).astype(np.float32), "F32")
        for norm in ("attn_norm", "ffn_norm"):
            made[f"blk.{layer}.{norm}.weight"] = (rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32), "F32")
    made["output_norm.weight"] = (rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32), "F32")
    if not tied:
        made["output.weight"] = (quantized(rng, (VOCAB, HIDDEN), kind), kind)
    return made


FIELDS = {
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": VOCAB,
}


def write_gguf(path, made=None, fields=None, architecture="llama"):
    """Write tensors (default: `tensors()`) and fields (over FIELDS; None leaves one out); returns `path`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**FIELDS, **(fields or {})}.items():
        _add(writer, key, value)
    for name, (data, kind) in (made or tensors()).items():
        raw = None if kind in ("F32", "F16", "I32") else Type[kind]
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


def dequantized(data: np.ndarray, kind: str) -> np.ndarray:
    """The numbers that stored data stands for, by the package."""
    return gguf.quants.dequantize(data, Type[kind])


def llama_cpp_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """[heads * d, ...] with pairs (0, d/2) ... -> llama.cpp's order, pairs (0, 1) ...; what its converter does."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
