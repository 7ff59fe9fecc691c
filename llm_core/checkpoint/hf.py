"""Names of Hugging Face's files, and MindFormers', both ways.

The only module that knows Hugging Face's names. Values are not changed: MindFormers rotates halves, as Hugging Face
does, so no row moves within a head. Projections that a family fuses are `hf_fused`'s matter.

A family is named by the `model_type` of its config.json. Llama's names are those of InternLM, Mistral, Qwen2 and Yi
too; they differ in their biases alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_QKV = ("attention.wq", "attention.wk", "attention.wv")
_EMBEDDING, _LAST_NORM = "model.tok_embeddings.embedding_weight", "model.norm_out"


@dataclass(frozen=True)
class _Names:
    """How a family writes what a decoder consists of: MindFormers' name -> its own.

    layer: what a layer's names begin with, its number left out. fused: the leaf that holds query, key and value.
    """

    layer: str
    leaves: dict[str, str]
    top: dict[str, str]
    fused: str = ""


_LLAMA = _Names(
    layer="model.layers.",
    leaves={
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    top={
        _EMBEDDING: "model.embed_tokens.weight",
        f"{_LAST_NORM}.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    },
)
_INTERNLM2 = _Names(
    layer="model.layers.",
    leaves={name: name for name in _LLAMA.leaves if name not in _QKV},
    top={
        _EMBEDDING: "model.tok_embeddings.weight",
        f"{_LAST_NORM}.weight": "model.norm.weight",
        "lm_head.weight": "output.weight",
    },
    fused="attention.wqkv",
)
_FALCON = _Names(
    layer="transformer.h.",
    leaves={
        "attention.wo": "self_attention.dense",
        "feed_forward.w1": "mlp.dense_h_to_4h",
        "feed_forward.w2": "mlp.dense_4h_to_h",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    },
    top={
        _EMBEDDING: "transformer.word_embeddings.weight",
        f"{_LAST_NORM}.weight": "transformer.ln_f.weight",
        f"{_LAST_NORM}.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
    },
    fused="self_attention.query_key_value",
)
_FALCON_TWO_NORMS = {"attention_norm": "ln_attn", "ffn_norm": "ln_mlp"}  # in layers with a norm for each branch

_FAMILIES = {
    "llama": _LLAMA, "internlm": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "internlm2": _INTERNLM2, "falcon": _FALCON,
}  # fmt: skip

_OUR_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_THEIR_LAYER = re.compile(r"(model\.layers\.|transformer\.h\.)(\d+)\.(.+)\.(weight|bias)")
_TOP_BACK = {theirs: ours for names in _FAMILIES.values() for ours, theirs in names.top.items()}
_LEAVES_BACK = {
    (names.layer, theirs): ours
    for names in (_LLAMA, _FALCON)
    for ours, theirs in [*names.leaves.items(), *(_FALCON_TWO_NORMS.items() if names is _FALCON else ())]
}
_FUSED = {(names.layer, names.fused) for names in (_FALCON, _INTERNLM2)}
_CLASSIFIER = re.compile(r"(score|classifier|qa_outputs)\.(weight|bias)")  # heads: "classifier" is Falcon's of tokens
_IN_TRANSFORMER = re.compile(r"transformer\.(?=(embed_tokens|layers|norm)\.)")  # a Llama that answers questions
# buffers of old files, computed from the configuration: no weights. The last counts the positions of a trained prefix.
_BUFFER = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|maybe_rotary\.inv_freq|mindpet_delta_\w+_prefix)"
)

# how the weights of other families begin, to say what a file is that is none of a decoder here
_OTHER_FAMILIES = (
    ("transformer.word_embeddings_layernorm", "BLOOM's Hugging Face names"),
    ("transformer.word_embeddings", "Falcon's or BLOOM's Hugging Face names"),
    ("transformer.h.", "GPT-2's or Falcon's Hugging Face names"),
    ("transformer.wte", "GPT-2's Hugging Face names"),
    ("gpt_neox.", "GPT-NeoX's names"),
    ("transformer.encoder.", "ChatGLM's names"),
    ("model.decoder.", "OPT's names"),
    ("bert.", "BERT's names"),
    ("backbone.", "MindFormers' names of a GPT, PanGu or BLOOM model"),
    ("base_model.model.", "PEFT's names (an adapter, no base model)"),
    ("model.embed_tokens.", "Hugging Face's Llama names"),
    ("model.layers.0.self_attn.", "Hugging Face's Llama names"),
    ("tok_embeddings.", "Meta's Llama names"),
    ("layers.0.attention.", "Meta's Llama names"),
)


def is_buffer(name: str) -> bool:
    """Whether the entry is no weight but a table that the model computes itself, such as the rotary one."""
    return bool(_BUFFER.fullmatch(name))


def family_hint(names: Iterable[str]) -> str | None:
    """What the names look like, where they are no MindFormers Llama's: 'Falcon's ... names', or None."""
    names = list(names)
    for start, what in _OTHER_FAMILIES:
        if any(name.startswith(start) for name in names):
            return what
    return None


# ---- names


def from_hf(name: str) -> str | None:
    """Hugging Face's name -> MindFormers', None for a name that no family has and for a fused projection."""
    name = _IN_TRANSFORMER.sub("model.", name)
    if _CLASSIFIER.fullmatch(name):
        return name.replace("classifier", "score")
    if name in _TOP_BACK:
        return _TOP_BACK[name]
    match = _THEIR_LAYER.fullmatch(name)
    ours = _LEAVES_BACK.get((match[1], match[3])) if match else None
    return f"model.layers.{match[2]}.{ours}.{match[4]}" if ours else None


def is_parameter(name: str) -> bool:
    """Whether MindFormers' name (split projections) is one of a decoder's here, of whatever family."""
    return any(to_hf(name, family) is not None for family in ("llama", "falcon"))


def parts_of_fused(name: str) -> list[str]:
    """MindFormers' names of query, key and value that Hugging Face's `name` holds in one; [] when it is not fused."""
    match = _THEIR_LAYER.fullmatch(name)
    if match is None or (match[1], match[3]) not in _FUSED:
        return []
    return [f"model.layers.{match[2]}.{part}.{match[4]}" for part in _QKV]


def to_hf(name: str, family: str = "llama", two_norms: bool = False) -> str | None:
    """MindFormers' name (split projections) -> that of a Hugging Face family, None for a name that it has not.

    Where the family fuses query, key and value, all three have the same name. two_norms: Falcon's layers have a norm
    for each branch.
    """
    names = _FAMILIES[family]
    if _CLASSIFIER.fullmatch(name):
        return name
    if name in names.top:
        return names.top[name]
    match = _OUR_LAYER.fullmatch(name)
    if match is None:
        return None
    number, leaf, kind = match.groups()
    theirs = names.fused if names.fused and leaf in _QKV else names.leaves.get(leaf)
    if two_norms and names is _FALCON:
        theirs = _FALCON_TWO_NORMS.get(leaf, theirs)
    return f"{names.layer}{number}.{theirs}.{kind}" if theirs else None


def name_beside_head(theirs: str, family: str, stored: Iterable[str]) -> str:
    """A family's name of a parameter as it is in its classifiers, where a head may change the names.

    stored: MindFormers' names of the whole model, which tell the head.
    """
    names = _FAMILIES[family]
    if names is _LLAMA and "qa_outputs.weight" in stored and theirs.startswith("model."):
        return "transformer." + theirs.removeprefix("model.")
    if names is _FALCON and "score.bias" in stored and theirs.startswith("score."):
        return "classifier." + theirs.removeprefix("score.")
    return theirs

