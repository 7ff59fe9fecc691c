"""A Hugging Face config.json of MindFormers' keys: the way back from `hf_folder`. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_core.config.hf_keys import FAMILIES
from llm_core.errors import UserError

_FAMILY_OF_CONFIG = {"LlamaConfig": "llama", "InternLMConfig": "internlm", "FalconConfig": "falcon"}
_ROPE_NAMES = {"PI": "linear", "DYNAMIC_NTK": "dynamic", "YARN": "yarn", "LLAMA3": "llama3"}
_ROPE_OF_INTERNLM = {"internlm": ("DYNAMIC_NTK",), "internlm2": ("PI", "DYNAMIC_NTK")}
_NO_WINDOW = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}


def model_config_to_hf(
    config: Mapping[str, Any], *, intermediate_size: int, dtype: str = "float32", family: str | None = None
) -> dict[str, Any]:
    """A config.json with these `model_config` keys.

    `intermediate_size` is the feed-forward's real width (the YAML may leave it to be computed); `dtype` the type of the
    saved weights; `family` a model_type, by default the one that `config` is named for. Raises UserError for what the
    family cannot say.
    """
    kind = str(config.get("type") or "LlamaConfig")
    name = family or _FAMILY_OF_CONFIG[kind]
    if ("falcon" in (name, _FAMILY_OF_CONFIG[kind])) and name != _FAMILY_OF_CONFIG[kind]:
        raise UserError(f"--model {name}: the configuration is a {kind}, which is no {name}")
    heads = config["num_heads"]
    content: dict[str, Any] = {"architectures": [f"{FAMILIES[name].name}ForCausalLM"], "model_type": name}
    content |= {theirs: config.get(ours, default) for theirs, (ours, default) in FAMILIES[name].keys.items()}
    content["max_position_embeddings"] = config.get("max_position_embedding") or config["seq_length"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    if "head_dim" in content:
        content["head_dim"] = width
    elif width * heads != config["hidden_size"]:
        raise UserError(f"head_dim: Hugging Face's {FAMILIES[name].name} has heads of hidden_size / num_heads alone")
    if name == "falcon":
        content |= {"ffn_hidden_size": intermediate_size, "activation": "gelu"}
        content["num_kv_heads"] = config.get("num_kv_heads") or heads
    else:
        content |= {"intermediate_size": intermediate_size, "hidden_act": "silu"}
        content["num_key_value_heads"] = config.get("n_kv_heads") or heads
        if name == "internlm" and content["num_key_value_heads"] != heads:
            raise UserError("n_kv_heads: InternLM's first generation has as many key and value heads as query heads")
        content |= _biases_to_hf(config, name)
        content |= _NO_WINDOW.get(name, {})
    content |= _rope_to_hf(config, name)
    return content | {
        "initializer_range": config.get("initializer_range", 0.02),
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": None if config["pad_token_id"] == -1 else config["pad_token_id"],
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _biases_to_hf(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The family's key for biases in the attention; UserError where it cannot have these."""
    everywhere = bool(config.get("has_bias"))
    inputs = everywhere or bool(config.get("qkv_has_bias"))
    possible = {"mistral": "no biases", "qwen2": "biases on query, key and value"}
    rule = possible.get(name, "biases on all four attention projections or on none")
    fits = {"mistral": not inputs, "qwen2": inputs and not everywhere}.get(name, inputs == everywhere)
    if not fits:
        raise UserError(f"qkv_has_bias, has_bias: Hugging Face's {FAMILIES[name].name} has {rule}")
    if name == "llama":
        return {"attention_bias": everywhere, "mlp_bias": False}
    return {"bias": everywhere} if name in ("internlm", "internlm2") else {}


def _rope_to_hf(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    method = str(config.get("extend_method") or "None")
    known = _ROPE_OF_INTERNLM.get(name, tuple(_ROPE_NAMES))
    if method not in ("None", *known):
        raise UserError(
            f"extend_method {method}: Hugging Face's {FAMILIES[name].name} lacks this RoPE scaling; "
            f"use one of {', '.join(known)}"
        )
    factor = config.get("scaling_factor", 1.0)
    parameters = dict(factor) if isinstance(factor, Mapping) else {"factor": float(factor)}
    if name == "internlm":
        rotary = {"base": config["theta"], "type": "origin" if method == "None" else "dynamic"}
        return {"rotary": rotary if method == "None" else {**rotary, "scaling_factor": parameters["factor"]}}
    if name == "internlm2" and method != "None":
        scaling = {"type": _ROPE_NAMES[method], "factor": parameters["factor"]}
        return {"rope_theta": config["theta"], "rope_scaling": scaling}
    scaling = None if method == "None" else {"rope_type": _ROPE_NAMES[method], **parameters}
    return {"rope_theta": config["theta"], "rope_scaling": scaling}
