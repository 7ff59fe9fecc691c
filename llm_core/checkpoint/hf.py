"""Names of the Llama family in Hugging Face's files and in MindFormers', both ways.

The only module that knows Hugging Face's names. Tensors keep their values and shapes: MindFormers rotates halves,
as Hugging Face does, so nothing is permuted. InternLM-7B has the same names, with biases in its attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_LEAVES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "model.norm.weight": "model.norm_out.weight",
    "lm_head.weight": "lm_head.weight",
}
_LEAVES_BACK = {ours: theirs for theirs, ours in _LEAVES.items()}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# a buffer of old files, computed from the configuration: no weight
_BUFFER = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")

# how the weights of other families begin, to say what a file is that fits no Llama
_OTHER_FAMILIES = (
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
    """Whether the entry is a rotary table, which the model computes itself."""
    return bool(_BUFFER.fullmatch(name))


def family_hint(names: Iterable[str]) -> str | None:
    """What the names look like, where they are no MindFormers Llama's: 'Falcon's ... names', or None."""
    names = list(names)
    for start, what in _OTHER_FAMILIES:
        if any(name.startswith(start) for name in names):
            return what
    return None


def _rename(name: str, top: dict[str, str], leaves: dict[str, str]) -> str | None:
    if name in top:
        return top[name]
    match = _LAYER.fullmatch(name)
    if match and match[2] in leaves:
        return f"model.layers.{match[1]}.{leaves[match[2]]}.{match[3]}"
    return None


def from_hf(name: str) -> str | None:
    """Hugging Face's name -> MindFormers', None for a name that no Llama has."""
    return _rename(name, _TOP, _LEAVES)


def to_hf(name: str) -> str | None:
    """MindFormers' name (split projections) -> Hugging Face's, None for a name that no Llama has."""
    return _rename(name, _TOP_BACK, _LEAVES_BACK)
