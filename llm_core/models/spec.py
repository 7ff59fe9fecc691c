"""What one decoder-only model is: sizes and the choices in which Llama, InternLM and Falcon differ.

A `DecoderSpec` is pure data (no MindSpore), so a checkpoint reader, a memory planner and the model itself all
read the same facts. `spec_from_config` makes one from the `model` section of a run's YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llm_core.errors import UserError

RopeMethod = Literal["none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: base, and how it is stretched beyond the trained length.

    Fields that a method does not use keep their defaults. `original_length` is the length the model was
    trained with (positions); the methods dynamic_ntk, yarn and llama3 scale relative to it.
    """

    theta: float = 10000.0
    method: RopeMethod = "none"
    factor: float = 1.0
    original_length: int = 0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class DecoderSpec:
    """Everything the decoder needs to know about a model.

    `residual`: "sequential" is Llama's (x += attention(norm(x)); x += mlp(norm(x))), "parallel" Falcon-7B's
    (x += attention(n) + mlp(n) with one norm), "parallel_two_norms" Falcon-40B's (one norm for each branch).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_position: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    residual: Literal["sequential", "parallel", "parallel_two_norms"] = "sequential"
    position: Literal["rope", "alibi"] = "rope"
    rope: RopeSpec = field(default_factory=RopeSpec)
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    qkv_concat: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model_config: num_heads {self.num_heads} is not a multiple of n_kv_heads {self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"model_config: head_dim {self.head_dim} is odd; rotary positions turn pairs of channels, "
                "so hidden_size / num_heads (or head_dim) must be even"
            )

    @property
    def q_size(self) -> int:
        """Channels of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Channels of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Number of trainable values of the whole model; a tied head counts once."""
        h, q, kv, f = self.hidden_size, self.q_size, self.kv_size, self.ffn_size
        attention = h * (q + 2 * kv) + q * h
        attention += (q + 2 * kv) * self.qkv_bias + h * self.output_bias
        projections = 3 if self.mlp == "swiglu" else 2
        mlp = projections * h * f + ((projections - 1) * f + h) * self.mlp_bias
        norm = h if self.norm == "rms" else 2 * h
        norms_per_layer = 1 if self.residual == "parallel" else 2
        head = 0 if self.tied_head else self.vocab_size * h
        return self.vocab_size * h + self.num_layers * (attention + mlp + norms_per_layer * norm) + norm + head


def ffn_width(hidden_size: int, intermediate_size: int | None, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward layer by MindFormers' rule.

    `intermediate_size` wins; otherwise two thirds of 4 x hidden_size (times the multiplier), rounded up to
    `multiple_of`: 11008 for Llama2-7B, 13824 for 13B, 28672 for 70B.
    """
    if intermediate_size:
        return intermediate_size
    width = 4 * hidden_size
    if multiplier is not None:
        width = int((multiplier + 0.01) * width)
    width = int(2 * width / 3)
    return multiple_of * -(-width // multiple_of)


def spec_from_config(model: Any) -> DecoderSpec:
    """Make the spec of the `model` section of a loaded config (`cfg.model`, with `.arch.type` and `.config`).

    Raises UserError for sizes that do not fit each other.
    """
    c = model.config
    if not getattr(c, "head_dim", None) and c.hidden_size % c.num_heads:
        raise UserError(
            f"model_config: hidden_size {c.hidden_size} is not a multiple of num_heads {c.num_heads}; "
            "change one of them, or give head_dim"
        )
    all_biases = bool(getattr(c, "has_bias", False))  # InternLM: q, k, v and o
    return DecoderSpec(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.n_kv_heads or c.num_heads,
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_heads,
        ffn_size=ffn_width(c.hidden_size, c.intermediate_size, c.multiple_of, c.ffn_dim_multiplier),
        max_position=c.max_position_embedding or c.seq_length,
        norm_eps=c.rms_norm_eps,
        rope=_rope_from_config(c),
        qkv_bias=all_biases or c.qkv_has_bias,
        output_bias=all_biases,
        tied_head=c.tie_word_embeddings,
        qkv_concat=c.qkv_concat,
        hidden_dropout=getattr(c, "hidden_dropout_rate", 0.0),
        attention_dropout=getattr(c, "attention_dropout_rate", 0.0),
        initializer_range=getattr(c, "initializer_range", 0.02),
    )


_ROPE_METHODS: dict[str, RopeMethod] = {
    "NONE": "none",
    "PI": "linear",
    "LINEAR": "linear",
    "NTK": "ntk",
    "DYNAMIC_NTK": "dynamic_ntk",
    "YARN": "yarn",
    "LLAMA3": "llama3",
}


def _rope_from_config(c: Any) -> RopeSpec:
    """Read theta, extend_method and scaling_factor (a number, or a dict with the method's own keys)."""
    name = str(c.extend_method or "None").upper()
    if name not in _ROPE_METHODS:
        raise UserError(
            f"model_config.extend_method: {c.extend_method!r} is unknown; one of None, PI, NTK, DYNAMIC_NTK, YARN, LLAMA3"
        )
    method = _ROPE_METHODS[name]
    length = c.max_position_embedding or c.seq_length
    if method == "none":
        return RopeSpec(theta=float(c.theta), original_length=length)
    scaling = c.scaling_factor
    if not isinstance(scaling, dict):
        if method == "llama3":
            raise UserError(
                "model_config.scaling_factor: LLAMA3 needs a dict with factor, low_freq_factor, high_freq_factor "
                f"and original_max_position_embeddings, got {scaling!r}"
            )
        scaling = {"factor": scaling}
    known = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "low_freq_factor", "high_freq_factor")
    extra = {key: float(scaling[key]) for key in known if scaling.get(key) is not None}
    try:
        factor = float(scaling["factor"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"model_config.scaling_factor: extend_method {c.extend_method} needs a number or a dict with `factor`, "
            f"got {c.scaling_factor!r}"
        ) from None
    original = int(scaling.get("original_max_position_embeddings") or length)
    return RopeSpec(theta=float(c.theta), method=method, factor=factor, original_length=original, **extra)
