"""What a GGUF file says of its model, as a config.json of Hugging Face's Llama."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_core.checkpoint.dtypes import Head
from llm_core.errors import UserError

_PREFIX = "llama."
_KNOWN = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "tensor_data_layout",  # of old files; it names the order of rows that every file has
}  # fmt: skip
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}

# Llama 3.1 and its successors: the only ones whose files carry factors of rotation, all made with these.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_config(
    fields: Mapping[str, Any], heads: Mapping[str, Head], rope_factors: np.ndarray | None, source: str
) -> dict[str, Any]:
    """The config.json of the model in a GGUF file.

    fields: the file's metadata. heads: its tensors, under MindFormers' names. rope_factors: [head_dim / 2], by which
    its frequencies are divided, or None. UserError, naming the key, for what this project's Llama does not compute.
    """
    own = {name.removeprefix(_PREFIX): value for name, value in fields.items() if name.startswith(_PREFIX)}
    _refuse_unknown(own, source)
    layers = _count(own, "block_count", source)
    hidden = _count(own, "embedding_length", source)
    heads_q = _count(own, "attention.head_count", source)
    heads_kv = _count(own, "attention.head_count_kv", source, heads_q)
    head_dim = _count(own, "attention.key_length", source, hidden // heads_q)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _count(own, key, source, head_dim) != head_dim:
            raise UserError(f"{source}: {_PREFIX}{key}: {own[key]} is not supported; it must be {head_dim}, a head's")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _vocabulary(heads, source),
        "hidden_size": hidden,
        "intermediate_size": _count(own, "feed_forward_length", source),
        "num_hidden_layers": layers,
        "num_attention_heads": heads_q,
        "num_key_value_heads": heads_kv,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _epsilon(own, source),
        "rope_theta": float(own.get("rope.freq_base", 10000.0)),
        "max_position_embeddings": _count(own, "context_length", source),
        "tie_word_embeddings": "lm_head.weight" not in heads,
        "attention_bias": _has_biases(heads, layers, source),
        "mlp_bias": False,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    config["rope_scaling"] = _rope_scaling(own, config, rope_factors, source)
    _check_projections(heads, config, source)
    for theirs, ours in _IDS.items():
        if f"tokenizer.ggml.{theirs}" in fields:
            config[ours] = int(fields[f"tokenizer.ggml.{theirs}"])
    return config


def _refuse_unknown(own: Mapping[str, Any], source: str) -> None:
    unknown = [key for key in own if key not in _KNOWN and own[key] not in (0, None, "none", "")]
    if unknown:
        shown = ", ".join(f"{_PREFIX}{key} = {own[key]!r}" for key in unknown[:4])
        raise UserError(f"{source}: {shown}: not supported, so the model would compute something else")


def _count(own: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = own.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:  # some files say it layer by layer
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = "is missing" if value is None else f"is {value!r}; one positive number is needed"
        raise UserError(f"{source}: {_PREFIX}{key} {what}")
    return value


def _epsilon(own: Mapping[str, Any], source: str) -> float:
    key = "attention.layer_norm_rms_epsilon"
    if key not in own:
        raise UserError(f"{source}: {_PREFIX}{key} is missing")
    return float(f"{own[key]:.7g}")  # stored in float32: 9.999999747378752e-06 was 1e-5


def _vocabulary(heads: Mapping[str, Head], source: str) -> int:
    embedding = heads.get("model.tok_embeddings.embedding_weight")
    if embedding is None:
        raise UserError(f"{source}: has no tensor token_embd.weight; it holds no whole model")
    return embedding.shape[0]


def _has_biases(heads: Mapping[str, Head], layers: int, source: str) -> bool:
    found = sum(name.endswith(".bias") for name in heads)
    if found not in (0, 4 * layers):
        raise UserError(
            f"{source}: has {found} biases; a Llama has them on all four attention projections of its {layers} layers "
            "or on none"
        )
    return found > 0


def _check_projections(heads: Mapping[str, Head], config: Mapping[str, Any], source: str) -> None:
    """The heads' sizes are said by the metadata and by the tensors; undoing the order of rows needs them to agree."""
    for leaf, count in (("wq", "num_attention_heads"), ("wk", "num_key_value_heads")):
        name = f"model.layers.0.attention.{leaf}.weight"
        rows = config[count] * config["head_dim"]
        if name in heads and heads[name].shape[0] != rows:
            raise UserError(
                f"{source}: {name} has {heads[name].shape[0]} rows, but {config[count]} heads of "
                f"{config['head_dim']} need {rows}"
            )


def _rope_scaling(
    own: Mapping[str, Any], config: Mapping[str, Any], factors: np.ndarray | None, source: str
) -> dict[str, Any] | None:
    """config.json's rope_scaling."""
    if factors is not None:
        return _llama3_scaling(config, factors, source)
    method = own.get("rope.scaling.type") or ("linear" if "rope.scale_linear" in own else "none")
    factor = float(own.get("rope.scaling.factor") or own.get("rope.scale_linear") or 1.0)
    if method == "none" or (method == "linear" and factor == 1.0):
        return None
    if method == "linear":
        return {"rope_type": "linear", "factor": factor}
    if method == "yarn":
        original = _count(own, "rope.scaling.original_context_length", source)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UserError(f"{source}: {_PREFIX}rope.scaling.type: {method!r} is not supported; linear and yarn are")


def _llama3_scaling(config: Mapping[str, Any], factors: np.ndarray, source: str) -> dict[str, Any]:
    """rope_scaling for the factors of a Llama 3.1 file, whose parameters the file itself does not tell.

    The slowest frequency is divided by the whole factor; the rest follows, and must be what the file has.
    """
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    expected = llama3_factors(config["head_dim"], config["rope_theta"], scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(f"{source}: rope_freqs.weight: these factors of rotation are not Llama 3's; not supported")
    return scaling


def llama3_factors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> np.ndarray:
    """By what Llama 3 divides each frequency, float64 [head_dim / 2]: 1 for the fast ones, `factor` for the slow."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the trained length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - share) / scaling["factor"] + share)
