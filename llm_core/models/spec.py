"""What one decoder-only model is: sizes and the choices in which Llama, InternLM and Falcon differ.

A `DecoderSpec` is pure data (no MindSpore), so a checkpoint reader, a memory planner and the model itself all
read the same facts. `spec_from_config` makes one from the `model` section of a run's YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llm_core.errors import UserError

RopeMethod = Literal["none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"]
Head = Literal["causal", "sequence", "token", "question"]

HEAD_NAMES: dict[Head, str] = {"causal": "lm_head", "sequence": "score", "token": "score", "question": "qa_outputs"}

_HEADS: dict[str, Head] = {
    "ForCausalLM": "causal",
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "question",
}


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
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of the factors of products; all else is float32
    head: Head = "causal"  # what is on top of the decoder: models.heads
    num_labels: int = 2  # classes of a classifier

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
    def bf16(self) -> bool:
        """Whether products are of bfloat16 numbers."""
        return self.compute_dtype == "bfloat16"

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
        head = self._head_parameters
        return self.vocab_size * h + self.num_layers * (attention + mlp + norms_per_layer * norm) + norm + head

    @property
    def head_has_bias(self) -> bool:
        """Whether the head adds a bias, as that of a token classifier and of question answering does."""
        return self.head in ("token", "question")

    @property
    def _head_parameters(self) -> int:
        if self.head == "causal":
            return 0 if self.tied_head else self.vocab_size * self.hidden_size
        return self.num_labels * (self.hidden_size + self.head_has_bias)


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


def head_of(arch_type: str) -> Head:
    """The head that a network of this name has: "sequence" of FalconForSequenceClassification."""
    return next(head for suffix, head in _HEADS.items() if arch_type.endswith(suffix))


def spec_from_config(model: Any) -> DecoderSpec:
    """Make the spec of the `model` section of a loaded config (`cfg.model`, with `.arch.type` and `.config`).

    Raises UserError for sizes that do not fit each other.
    """
    c = model.config
    if c.head_dim is None and c.hidden_size % c.num_heads:
        raise UserError(
            f"model_config: hidden_size {c.hidden_size} is not a multiple of num_heads {c.num_heads}; "
            "change one of them, or give head_dim"
        )
    head = head_of(model.arch.type)
    common = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        head_dim=c.head_dim or c.hidden_size // c.num_heads,
        max_position=max(c.max_position_embedding or 0, c.seq_length),
        rope=_rope_from_config(c),
        tied_head=c.tie_word_embeddings and head == "causal",
        head=head,
        num_labels=2 if head == "question" else c.num_labels,  # where an answer starts, and where it ends
        hidden_dropout=c.hidden_dropout_rate,
        attention_dropout=c.attention_dropout_rate,
        initializer_range=c.initializer_range,
        compute_dtype="bfloat16" if c.compute_dtype == "bfloat16" else "float32",
    )
    if model.arch.type.startswith("Falcon"):
        return DecoderSpec(**common, **_falcon_choices(c))
    return DecoderSpec(
        **common,
        num_kv_heads=c.n_kv_heads or c.num_heads,
        ffn_size=ffn_width(c.hidden_size, c.intermediate_size, c.multiple_of, c.ffn_dim_multiplier),
        norm_eps=c.rms_norm_eps,
        qkv_bias=c.qkv_has_bias or c.has_bias,
        output_bias=c.has_bias,
        qkv_concat=c.qkv_concat,
    )


def _falcon_choices(c: Any) -> dict[str, Any]:
    """What makes a Falcon: its fields of the spec."""
    if c.new_decoder_architecture:
        residual = "parallel" if c.num_ln_in_parallel_attn == 1 else "parallel_two_norms"
        kv_heads = c.num_kv_heads or c.num_heads
    else:
        residual = "parallel" if c.parallel_attn else "sequential"
        kv_heads = 1 if c.multi_query else c.num_heads
    return dict(
        num_kv_heads=kv_heads,
        ffn_size=c.ffn_hidden_size or 4 * c.hidden_size,
        norm="layer",
        norm_eps=c.layer_norm_epsilon,
        residual=residual,
        position="alibi" if c.alibi else "rope",
        mlp="gelu",
        qkv_bias=c.bias,
        output_bias=c.bias,
        mlp_bias=c.bias,
    )


_ROPE_METHODS: dict[str, RopeMethod] = {
    "None": "none",
    "PI": "linear",
    "NTK": "ntk",
    "DYNAMIC_NTK": "dynamic_ntk",
    "YARN": "yarn",
    "LLAMA3": "llama3",
}
_ROPE_OPTIONS = (
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
)


def _rope_from_config(c: Any) -> RopeSpec:
    """Read theta, extend_method and scaling_factor (a number, or a mapping with the method's own keys)."""
    method = _ROPE_METHODS[c.extend_method]
    length = c.max_position_embedding or c.seq_length
    if method == "none":
        return RopeSpec(theta=c.theta, original_length=length)
    scaling = c.scaling_factor if isinstance(c.scaling_factor, dict) else {"factor": c.scaling_factor}
    needed = ["factor"]
    if method == "llama3":
        needed += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [key for key in needed if scaling.get(key) is None]
    if missing:
        raise UserError(
            f"model_config.scaling_factor: extend_method {c.extend_method} needs {', '.join(missing)} as well, "
            f"got {c.scaling_factor!r}"
        )
    options = {key: float(scaling[key]) for key in _ROPE_OPTIONS if scaling.get(key) is not None}
    original = int(scaling.get("original_max_position_embeddings") or length)
    return RopeSpec(
        theta=c.theta, method=method, factor=float(scaling["factor"]), original_length=original, **options
    )
