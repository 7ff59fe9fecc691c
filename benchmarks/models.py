"""The models of the benchmarks, described once for both sides: as a DecoderSpec, and for transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama or a Falcon (LayerNorm, erf-GELU, attention and feed-forward side by side, no biases)."""

    family: str  # llama | falcon
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    tied_head: bool = False

    def settings(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self)

    def spec(self, max_position: int, compute_dtype: str = "float32") -> Any:
        """Ours."""
        from llm_core.models.spec import DecoderSpec

        falcon = dict(norm="layer", residual="parallel", mlp="gelu") if self.family == "falcon" else {}
        return DecoderSpec(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            ffn_size=self.ffn_size,
            max_position=max_position,
            tied_head=self.tied_head,
            compute_dtype=compute_dtype,
            **falcon,
        )

    def hf(self, max_position: int, **more: Any) -> Any:
        """Transformers' model with random weights and its default attention (sdpa); `more`: keys of its config."""
        from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

        common = dict(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=max_position,
            tie_word_embeddings=self.tied_head,
            **more,
        )
        if self.family == "falcon":
            if self.num_kv_heads != 1:
                raise ValueError("this Falcon has one key/value head")
            falcon = dict(multi_query=True, parallel_attn=True, new_decoder_architecture=False, alibi=False, bias=False)
            return FalconForCausalLM(FalconConfig(ffn_hidden_size=self.ffn_size, **falcon, **common))
        llama = dict(num_key_value_heads=self.num_kv_heads, intermediate_size=self.ffn_size, rms_norm_eps=1e-5)
        return LlamaForCausalLM(LlamaConfig(**llama, **common))


MODELS = {
    "llama_16m": Model("llama", 8192, 384, 6, 6, 2, 1024),  # 15.7M parameters
    "llama_135m": Model("llama", 49152, 576, 30, 9, 3, 1536, tied_head=True),  # 134.5M: SmolLM-135M's sizes
    "falcon_16m": Model("falcon", 8192, 384, 6, 6, 1, 1536),  # 15.4M
}
