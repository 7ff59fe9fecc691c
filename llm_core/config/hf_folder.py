"""A Hugging Face model folder: is it one, and what its config.json says in MindFormers' keys, both ways.

What a family's keys mean stands in `hf_keys`, which file is its tokenizer in `llm_core.text.folder`. Standard library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_core.config.hf_keys import DEFAULT_IDS, FAMILIES, HEADS, IGNORED, ONLY, HfFamily
from llm_core.errors import UserError
from llm_core.text.folder import CONFIG, read_json, tokenizer_file

__all__ = [
    "family_of", "has_two_norms", "hf_config_to_model_config", "is_hf_folder", "qkv_grouping", "read_hf_config",
    "tokenizer_file", "tokenizer_policy",
]  # fmt: skip

_ROPE_METHODS = {"linear": "PI", "dynamic": "DYNAMIC_NTK", "yarn": "YARN", "llama3": "LLAMA3", "default": "None"}
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


def tokenizer_policy(folder: str | Path) -> dict[str, bool | None]:
    """add_bos_token and add_eos_token of tokenizer_config.json; None where it is silent, and the tokenizer knows."""
    said = read_json(Path(folder) / CONFIG)
    return {key: said[key] if isinstance(said.get(key), bool) else None for key in ("add_bos_token", "add_eos_token")}


def family_of(hf: Mapping[str, Any], source: str = "config.json") -> str:
    """The family, a key of `hf_keys.FAMILIES`. Raises UserError for one that is not supported."""
    kind = hf.get("model_type")
    if kind is None:
        listed = hf.get("architectures") or [None]
        kind = next((name for name, family in FAMILIES.items() if listed[0] == f"{family.name}ForCausalLM"), listed)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{source}: model_type: {kind!r} is not supported; it must be one of {', '.join(FAMILIES)}")
    return kind


# ---- config.json -> our keys


def hf_config_to_model_config(
    hf: Mapping[str, Any], source: str = "config.json", seq_length: int | None = None
) -> dict[str, Any]:
    """The `model_config` keys of a config.json: architecture, seq_length and special ids.

    Every architecture key is returned, HF's default where config.json is silent, so that nothing of another model's
    YAML shines through. seq_length: the context that the run asks for, null for all that the model has. Raises
    UserError, naming the key, for what this decoder does not compute and for a key that is not known.
    """
    name = family_of(hf, source)
    family = FAMILIES[name]
    _refuse_unsupported(hf, family, source)
    result: dict[str, Any] = {"type": family.config, **family.fixed}
    for theirs, (ours, default) in family.keys.items():
        value = hf.get(theirs)
        result[ours] = default if value is None else value
    result["seq_length"] = result["max_position_embedding"]
    if hf.get("initializer_range"):
        result["initializer_range"] = hf["initializer_range"]
    if hf.get("id2label") and any("Classification" in name for name in hf.get("architectures") or []):
        result["num_labels"] = len(hf["id2label"])
    if name == "internlm":
        result.update(_rope_of_internlm(hf, source))
    elif not result.get("alibi"):
        result.update(_rope_from_hf(hf, source))
    else:
        result.update(_NO_SCALING)
    if name == "falcon":
        _settle_falcon(result, source)
    else:
        result["n_kv_heads"] = result["n_kv_heads"] or result["num_heads"]
    if name == "internlm" and result["n_kv_heads"] != result["num_heads"]:
        raise UserError(f"{source}: num_key_value_heads: in InternLM's first generation it must be num_attention_heads")
    _keep_within_window(result, _window(hf, name, result["num_layers"], source), seq_length, source)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = hf.get(key, DEFAULT_IDS.get(name, {}).get(key))
        if value is not None:
            result[key] = value
    return result


def _refuse_unsupported(hf: Mapping[str, Any], family: HfFamily, source: str) -> None:
    for architecture in hf.get("architectures") or []:
        if architecture not in {f"{family.name}{head}" for head in HEADS}:
            raise UserError(f"{source}: architectures: {architecture!r} is not supported")
    for key, value in hf.items():
        allowed = {**ONLY, **family.only}.get(key)
        if allowed is not None:
            if value is not None and value not in allowed:
                raise UserError(f"{source}: {key}: {value!r} is not supported; it must be {allowed[0]!r}")
        elif value is not None and key not in family.keys and key not in family.special and key not in IGNORED:
            raise UserError(
                f"{source}: {key}: not a known key of {family.name}, so its value {value!r} might change what the "
                "model computes; if it does not, remove it from config.json"
            )


_NO_SCALING = {"theta": 10000.0, "extend_method": "None", "scaling_factor": 1.0}


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
        return {**_NO_SCALING, "theta": theta}
    unknown = sorted(set(scaling) - _ROPE_PARAMETERS)
    if unknown:
        raise UserError(f"{source}: rope_scaling.{unknown[0]}: is not supported")
    if not isinstance(scaling.get("factor"), int | float):
        raise UserError(f"{source}: rope_scaling.factor: a number is needed")
    given = {name: value for name, value in scaling.items() if value is not None}
    trained, positions = given.get("original_max_position_embeddings"), hf.get("max_position_embeddings")
    if method == "dynamic" and trained not in (None, positions):  # releases of transformers disagree on what it means
        raise UserError(
            f"{source}: rope_scaling.original_max_position_embeddings: {trained} is not supported for type 'dynamic'; "
            f"it must be max_position_embeddings, {positions}"
        )
    factor = given["factor"] if set(given) == {"factor"} else given
    return {"theta": theta, "extend_method": _ROPE_METHODS[method], "scaling_factor": factor}


def _rope_of_internlm(hf: Mapping[str, Any], source: str) -> dict[str, Any]:
    """InternLM's `rotary`: plain positions ("origin"), or a base that grows beyond the trained length ("dynamic")."""
    rotary = hf.get("rotary") or {"base": 10000, "type": "dynamic"}
    kind = rotary.get("type") if isinstance(rotary, Mapping) else None
    if kind not in ("origin", "dynamic") or set(rotary) - {"base", "type", "scaling_factor"}:
        raise UserError(
            f"{source}: rotary: {rotary!r} is not supported; it must have base and type, origin or dynamic"
        )
    rope = {**_NO_SCALING, "theta": float(rotary.get("base", 10000))}
    if kind == "dynamic":
        rope |= {"extend_method": "DYNAMIC_NTK", "scaling_factor": float(rotary.get("scaling_factor", 1.0))}
    return rope


def _settle_falcon(result: dict[str, Any], source: str) -> None:
    """Drop what the layer's kind makes meaningless; refuse what Hugging Face's own Falcon cannot run."""
    norms, kv_heads = result["num_ln_in_parallel_attn"], result["num_kv_heads"]
    if result["new_decoder_architecture"]:
        if not result["parallel_attn"]:
            raise UserError(f"{source}: parallel_attn: False is not supported with new_decoder_architecture")
        if norms not in (None, 1, 2):
            raise UserError(f"{source}: num_ln_in_parallel_attn: {norms!r} is not supported; it must be 1 or 2")
        return
    if norms not in (None, 1) and result["parallel_attn"]:
        raise UserError(f"{source}: num_ln_in_parallel_attn: {norms!r} needs new_decoder_architecture")
    if not result["multi_query"] and kv_heads not in (None, result["num_heads"]):
        raise UserError(f"{source}: num_kv_heads: {kv_heads!r} needs new_decoder_architecture")
    result["num_ln_in_parallel_attn"] = result["num_kv_heads"] = None


def _window(hf: Mapping[str, Any], name: str, layers: int, source: str) -> int | None:
    """Tokens that a query sees at most; None = all before it."""
    if name == "mistral":
        return hf.get("sliding_window", 4096)
    if name != "qwen2":
        return None
    kinds, used = hf.get("layer_types"), bool(hf.get("use_sliding_window"))
    if kinds is None:
        slides = used and layers > hf.get("max_window_layers", 28)
    else:
        slides = any(kind != "full_attention" for kind in kinds)
        if slides and (not used or set(kinds) - {"full_attention", "sliding_attention"}):
            raise UserError(f"{source}: layer_types: {sorted(set(kinds))} is not supported")
    return hf.get("sliding_window", 4096) if slides else None


def _keep_within_window(result: dict[str, Any], window: int | None, seq_length: int | None, source: str) -> None:
    """Refuse a context that is longer than the window; shorter ones never meet it."""
    if window is None or window >= result["max_position_embedding"]:
        return
    context = seq_length or result["max_position_embedding"]
    if context > window or result["extend_method"] != "None":
        raise UserError(
            f"{source}: sliding_window: {window} is not supported for a context of {context}: attention sees all of it "
            f"here. Texts of at most {window} tokens do not meet it: add --model.model_config.seq_length {window}"
        )
    result["max_position_embedding"] = window


# ---- fused projections


def qkv_grouping(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Key/value heads and the width of a head, by which Falcon and InternLM2 group their fused projection."""
    name = family_of(hf)

    def value(key: str) -> Any:
        return FAMILIES[name].keys[key][1] if hf.get(key) is None else hf[key]

    heads = value("num_attention_heads")
    width = hf.get("head_dim") or value("hidden_size") // heads
    if name != "falcon":
        return value("num_key_value_heads") or heads, width
    if value("new_decoder_architecture"):
        return value("num_kv_heads") or heads, width
    return 1 if value("multi_query") else heads, width


def has_two_norms(config: Mapping[str, Any]) -> bool:
    """Whether the layers of these `model_config` keys are a Falcon's with a norm for each branch."""
    return bool(config.get("new_decoder_architecture")) and config.get("num_ln_in_parallel_attn") != 1
