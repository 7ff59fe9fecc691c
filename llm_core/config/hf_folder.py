"""A Hugging Face model folder: is it one, and what its config.json says in MindFormers' keys. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_core.errors import UserError

# config.json key, our key, HF's default for Llama
_LLAMA_KEYS = (
    ("vocab_size", "vocab_size", 32000),
    ("hidden_size", "hidden_size", 4096),
    ("intermediate_size", "intermediate_size", 11008),
    ("num_hidden_layers", "num_layers", 32),
    ("num_attention_heads", "num_heads", 32),
    ("rms_norm_eps", "rms_norm_eps", 1e-6),
    ("max_position_embeddings", "max_position_embedding", 2048),
    ("tie_word_embeddings", "tie_word_embeddings", False),
    ("attention_bias", "has_bias", False),
)

_ROPE_METHODS = {"linear": "PI", "dynamic": "DYNAMIC_NTK", "yarn": "YARN", "llama3": "LLAMA3", "default": "None"}
_ROPE_NAMES = {"PI": "linear", "DYNAMIC_NTK": "dynamic", "YARN": "yarn", "LLAMA3": "llama3"}
_ROPE_PARAMETERS = {
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "attention_factor", "low_freq_factor", "high_freq_factor",
}  # fmt: skip


def is_hf_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with a config.json that names a model type, as Hugging Face saves a model."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # it is meant to be one; reading it says what is wrong
    return isinstance(content, dict) and ("model_type" in content or "architectures" in content)


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json. Raises UserError, naming file and line, when it is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object")
    return content


def tokenizer_file(folder: str | Path) -> Path | None:
    """The folder's tokenizer: tokenizer.model, else tokenizer.json, else None."""
    for name in ("tokenizer.model", "tokenizer.json"):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return None


def hf_config_to_model_config(hf: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The `model_config` keys of a Llama's config.json: architecture, seq_length and special ids.

    Every architecture key is returned, HF's default where config.json is silent, so that nothing of another model's
    YAML shines through. Raises UserError, naming the key, for what this decoder does not compute.
    """
    _refuse_foreign(hf, source)
    result: dict[str, Any] = {"type": "LlamaConfig"}
    for theirs, ours, default in _LLAMA_KEYS:
        value = hf.get(theirs)
        result[ours] = default if value is None else value
    result["n_kv_heads"] = hf.get("num_key_value_heads") or result["num_heads"]
    result["head_dim"] = hf.get("head_dim")
    result["ffn_dim_multiplier"] = None
    result["qkv_has_bias"] = False
    result["qkv_concat"] = False
    result["seq_length"] = result["max_position_embedding"]
    if hf.get("initializer_range"):
        result["initializer_range"] = hf["initializer_range"]
    result.update(_rope_from_hf(hf, source))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if hf.get(name) is not None:
            result[name] = hf[name]
    return result


def _refuse_foreign(hf: Mapping[str, Any], source: str) -> None:
    kind = hf.get("model_type") or hf.get("architectures")
    if kind not in ("llama", ["LlamaForCausalLM"]):
        raise UserError(f"{source}: model_type: {kind!r} is not supported; it must be 'llama'")
    wanted = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None}
    for name, only in wanted.items():
        if hf.get(name, only) not in (only, None):
            raise UserError(f"{source}: {name}: {hf[name]!r} is not supported; it must be {only!r}")


def _rope_from_hf(hf: Mapping[str, Any], source: str) -> dict[str, Any]:
    """theta, extend_method and scaling_factor, from rope_scaling or the newer rope_parameters."""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{source}: rope_scaling: {given!r} is not supported; it must be an object")
    scaling = dict(given)
    theta = hf.get("rope_theta") or scaling.pop("rope_theta", None) or 10000.0
    scaling.pop("rope_theta", None)
    newer, older = scaling.pop("rope_type", None), scaling.pop("type", None)
    method = str(newer or older or "default")
    if method not in _ROPE_METHODS:
        raise UserError(
            f"{source}: rope_scaling: type {method!r} is not supported; it must be one of {', '.join(_ROPE_METHODS)}"
        )
    if method == "default":
        return {"theta": theta, "extend_method": "None", "scaling_factor": 1.0}
    unknown = sorted(set(scaling) - _ROPE_PARAMETERS)
    if unknown:
        raise UserError(f"{source}: rope_scaling.{unknown[0]}: is not supported")
    if not isinstance(scaling.get("factor"), int | float):
        raise UserError(f"{source}: rope_scaling.factor: a number is needed")
    given = {name: value for name, value in scaling.items() if value is not None}
    factor = given["factor"] if set(given) == {"factor"} else given
    return {"theta": theta, "extend_method": _ROPE_METHODS[method], "scaling_factor": factor}


def model_config_to_hf(config: Mapping[str, Any], *, intermediate_size: int, dtype: str = "float32") -> dict[str, Any]:
    """A config.json for a Llama with these `model_config` keys.

    `intermediate_size` is the feed-forward's real width (the YAML may leave it to be computed); `dtype` the type of the
    saved weights. Raises UserError for what HF's Llama cannot say.
    """
    method = str(config.get("extend_method") or "None")
    if method not in ("None", *_ROPE_NAMES):
        raise UserError(
            f"extend_method {method}: Hugging Face's Llama lacks this RoPE scaling; use one of {', '.join(_ROPE_NAMES)}"
        )
    has_bias = bool(config.get("has_bias"))
    if config.get("qkv_has_bias") and not has_bias:
        raise UserError("qkv_has_bias: Hugging Face's Llama has biases on all four attention projections or on none")
    heads = config["num_heads"]
    scaling = None
    if method != "None":
        factor = config["scaling_factor"]
        parameters = dict(factor) if isinstance(factor, Mapping) else {"factor": float(factor)}
        scaling = {"rope_type": _ROPE_NAMES[method], **parameters}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": intermediate_size,
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": config["theta"],
        "rope_scaling": scaling,
        "max_position_embeddings": config.get("max_position_embedding") or config["seq_length"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "attention_bias": has_bias,
        "mlp_bias": False,
        "initializer_range": config.get("initializer_range", 0.02),
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": None if config["pad_token_id"] == -1 else config["pad_token_id"],
        "torch_dtype": dtype,
        "use_cache": True,
    }
