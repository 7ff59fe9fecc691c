"""Every key of a Hugging Face config.json that is understood: a table for each family, and those that change nothing.

A key that is in none of these tables is refused by name: it might change what the model computes. Standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HfFamily:
    """One `model_type`: what it is built as, and its keys.

    name: the first part of its classes (MistralForCausalLM). config: the type of our model_config.
    keys: its key -> (our key, Hugging Face's default). fixed: our keys that the family leaves no choice.
    only: its keys that are supported with these values alone. special: its keys that `hf_folder` reads by itself.
    """

    name: str
    config: str
    keys: dict[str, tuple[str, Any]]
    fixed: dict[str, Any] = field(default_factory=dict)
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    special: frozenset[str] = frozenset()


_ROPE = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
_SILU = {"hidden_act": ("silu", "swish")}


def _llama_keys(vocab: int, ffn: int, positions: int, kv_heads: int | None) -> dict[str, tuple[str, Any]]:
    return {
        "vocab_size": ("vocab_size", vocab),
        "hidden_size": ("hidden_size", 4096),
        "intermediate_size": ("intermediate_size", ffn),
        "num_hidden_layers": ("num_layers", 32),
        "num_attention_heads": ("num_heads", 32),
        "num_key_value_heads": ("n_kv_heads", kv_heads),
        "head_dim": ("head_dim", None),
        "rms_norm_eps": ("rms_norm_eps", 1e-6),
        "max_position_embeddings": ("max_position_embedding", positions),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    }


_INTERNLM_KEYS = {
    **{theirs: known for theirs, known in _llama_keys(103168, 11008, 2048, None).items() if theirs != "head_dim"},
    "bias": ("has_bias", True),
}
_NO_BIAS = {"has_bias": False, "qkv_has_bias": False}
_CONCEALED = {"ffn_dim_multiplier": None, "qkv_concat": False}  # what a YAML may say, and config.json decides

FAMILIES: dict[str, HfFamily] = {
    "llama": HfFamily(
        "Llama", "LlamaConfig",
        {**_llama_keys(32000, 11008, 2048, None), "attention_bias": ("has_bias", False)},
        {**_CONCEALED, "qkv_has_bias": False},
        {**_SILU, "mlp_bias": (False,)}, _ROPE,
    ),
    "mistral": HfFamily(
        "Mistral", "LlamaConfig", _llama_keys(32000, 14336, 131072, 8), {**_CONCEALED, **_NO_BIAS},
        {**_SILU, "attention_bias": (False,)},
        _ROPE | {"sliding_window"},
    ),
    "qwen2": HfFamily(
        "Qwen2", "LlamaConfig", _llama_keys(151936, 22016, 32768, 32),
        {**_CONCEALED, "has_bias": False, "qkv_has_bias": True}, {**_SILU, "use_mrope": (False,)},
        _ROPE | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    ),
    "internlm": HfFamily(
        "InternLM", "InternLMConfig",
        _INTERNLM_KEYS, {**_CONCEALED, "qkv_has_bias": False, "head_dim": None}, _SILU, frozenset({"rotary"}),
    ),
    "internlm2": HfFamily(
        "InternLM2", "LlamaConfig",
        _INTERNLM_KEYS, {**_CONCEALED, "qkv_has_bias": False, "head_dim": None}, _SILU, _ROPE,
    ),
    "falcon": HfFamily(
        "Falcon", "FalconConfig",
        {
            "vocab_size": ("vocab_size", 65024),
            "hidden_size": ("hidden_size", 4544),
            "ffn_hidden_size": ("ffn_hidden_size", None),
            "num_hidden_layers": ("num_layers", 32),
            "num_attention_heads": ("num_heads", 71),
            "num_kv_heads": ("num_kv_heads", None),
            "num_ln_in_parallel_attn": ("num_ln_in_parallel_attn", None),
            "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
            "max_position_embeddings": ("max_position_embedding", 2048),
            "tie_word_embeddings": ("tie_word_embeddings", True),
            "alibi": ("alibi", False),
            "new_decoder_architecture": ("new_decoder_architecture", False),
            "multi_query": ("multi_query", True),
            "parallel_attn": ("parallel_attn", True),
            "bias": ("bias", False),
        },
        {"head_dim": None},
        {"activation": ("gelu",), "apply_residual_connection_post_layernorm": (False,)}, _ROPE,
    ),
}  # fmt: skip

# Which special ids a family has where config.json is silent; the others keep the YAML's.
DEFAULT_IDS: dict[str, dict[str, int]] = {"falcon": {"bos_token_id": 11, "eos_token_id": 11}}

HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")

# Keys of every family that are supported with these values alone; what they are without is computed.
ONLY: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
}

# Keys that change no number of the model, by the reason.
IGNORED: dict[str, str] = {
    name: reason
    for reason, names in {
        "names and book-keeping": (
            "model_type architectures auto_map _name_or_path name_or_path _commit_hash transformers_version "
            "tokenizer_class prefix finetuning_task task_specific_params id2label label2id num_labels problem_type "
            "is_llama_config transformers.js_config unsloth_version unsloth_fixed"
        ),
        "special ids, taken over": "bos_token_id eos_token_id pad_token_id",
        "the spread of initial weights, taken over": "initializer_range",
        "ids of other architectures": "sep_token_id decoder_start_token_id",
        "the type of the stored weights, seen from the files": "torch_dtype dtype",
        "how it is computed elsewhere, not what": (
            "use_cache pretraining_tp attn_implementation _attn_implementation _attn_implementation_autoset "
            "_attn_implementation_internal _flash_attn_2_enabled torchscript use_bfloat16 tf_legacy_loss "
            "chunk_size_feed_forward gradient_checkpointing is_decoder"
        ),
        "what else is returned": "output_attentions output_hidden_states return_dict",
        "the longest text of a tool; max_position_embeddings counts": "max_sequence_length",
        "dropout, which the run's YAML says": "attention_dropout hidden_dropout",
        "generation, which the run's YAML says": (
            "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
            "top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids "
            "encoder_no_repeat_ngram_size num_return_sequences output_scores return_dict_in_generate "
            "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
            "suppress_tokens begin_suppress_tokens"
        ),
    }.items()
    for name in names.split()
}
