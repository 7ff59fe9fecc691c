"""The spec: sizes from a config, MindFormers' width rule, the number of parameters, RoPE scaling."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llm_core.errors import UserError
from llm_core.models.spec import DecoderSpec, ffn_width, spec_from_config


def model_section(arch: str = "LlamaForCausalLM", **changes) -> SimpleNamespace:
    """A `model` section with the schema's defaults, as the config package makes it."""
    from llm_core.config.model_section import FalconConfig, InternLMConfig, LlamaConfig

    family = arch.removesuffix("ForCausalLM")
    schema = {"Llama": LlamaConfig, "InternLM": InternLMConfig, "Falcon": FalconConfig}[family]
    return SimpleNamespace(arch=SimpleNamespace(type=arch), config=schema(type=f"{family}Config", **changes))


LLAMA2 = {
    "7b": (dict(), 6738415616),
    "13b": (dict(hidden_size=5120, num_layers=40, num_heads=40), 13015864320),
    "70b": (
        dict(hidden_size=8192, num_layers=80, num_heads=64, n_kv_heads=8, ffn_dim_multiplier=1.3),
        68976648192,
    ),
}


@pytest.mark.parametrize("size", LLAMA2)
def test_published_llama2_sizes(size):
    changes, parameters = LLAMA2[size]
    if size == "70b":
        changes = changes | {"multiple_of": 4096}
    assert spec_from_config(model_section(**changes)).num_parameters == parameters


def test_internlm_has_attention_biases():
    spec = spec_from_config(model_section("InternLMForCausalLM"))
    assert spec.qkv_bias and spec.output_bias and not spec.mlp_bias
    assert spec.num_parameters == 7321948160  # 8,388,608 of LoRA are 0.1146 % of it


@pytest.mark.parametrize(
    ("hidden", "multiple", "multiplier", "width"),
    [(4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672), (64, 256, None, 256)],
)
def test_ffn_width(hidden, multiple, multiplier, width):
    assert ffn_width(hidden, None, multiple, multiplier) == width
    assert ffn_width(hidden, 77, multiple, multiplier) == 77


def test_falcon_choices():
    seven = spec_from_config(model_section("FalconForCausalLM"))
    assert (seven.residual, seven.position, seven.num_kv_heads) == ("parallel", "rope", 1)
    assert seven.num_parameters == 6921720704
    forty = spec_from_config(
        model_section(
            "FalconForCausalLM",
            hidden_size=8192,
            num_layers=60,
            num_heads=128,
            num_kv_heads=8,
            new_decoder_architecture=True,
        )
    )
    assert (forty.residual, forty.num_kv_heads) == ("parallel_two_norms", 8)
    small = dict(hidden_size=2048, num_layers=24, num_heads=32, vocab_size=50304, alibi=True, bias=True)
    rw = spec_from_config(model_section("FalconForCausalLM", **small, parallel_attn=False, multi_query=False))
    assert (rw.residual, rw.position, rw.num_kv_heads, rw.mlp_bias) == ("sequential", "alibi", 32, True)
    assert rw.num_parameters == 1311625216  # the published tiiuae/falcon-rw-1b
    with pytest.raises(ValueError, match="extend_method PI"):
        model_section("FalconForCausalLM", alibi=True, extend_method="PI", scaling_factor=2.0)


def test_parameters_of_the_built_model():
    from llm_core.models.decoder import CausalLM

    biases = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
    falcon = {"norm": "layer", "mlp": "gelu", "tied_head": True}
    for changes in (
        {},
        {"tied_head": True},
        biases,
        falcon | biases | {"position": "alibi"},
        falcon | {"residual": "parallel"},
        falcon | {"residual": "parallel_two_norms"},
    ):
        spec = DecoderSpec(50, 24, 2, 4, 2, 6, 40, 16, **changes)
        for joined in (False, True):
            built = CausalLM(DecoderSpec(**(vars(spec) | {"qkv_concat": joined})), seed=None)
            assert sum(p.size for p in built.trainable_params()) == spec.num_parameters


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="n_kv_heads 3"):
        DecoderSpec(50, 24, 2, 4, 3, 6, 40, 16)
    with pytest.raises(UserError, match="odd"):
        DecoderSpec(50, 20, 2, 4, 2, 5, 40, 16)


def test_rope_from_config():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = spec_from_config(model_section(extend_method="LLAMA3", scaling_factor=scaling, theta=5e5)).rope
    assert (rope.method, rope.theta, rope.factor, rope.original_length) == ("llama3", 5e5, 8.0, 64)
    rope = spec_from_config(model_section(extend_method="PI", scaling_factor=2.0, max_position_embedding=32)).rope
    assert (rope.method, rope.factor, rope.original_length) == ("linear", 2.0, 32)
    with pytest.raises(UserError, match="low_freq_factor"):
        spec_from_config(model_section(extend_method="LLAMA3", scaling_factor=8.0))


def test_ntk_multiplies_the_base_as_mindformers_does():
    from llm_core.models.rope import rope_frequencies
    from llm_core.models.spec import RopeSpec

    frequencies, scale = rope_frequencies(RopeSpec(100.0, "ntk", 4.0, 32), 8)
    np.testing.assert_allclose(frequencies, 400.0 ** (-np.arange(0, 8, 2) / 8), rtol=1e-6)
    assert scale == 1.0


def test_dynamic_ntk_refuses_what_it_has_no_frequencies_for():
    from mindspore import Tensor

    from llm_core.models.rope import RotaryAngles
    from llm_core.models.spec import RopeSpec

    angles = RotaryAngles(RopeSpec(100.0, "dynamic_ntk", 2.0, 8), 4, 12)
    positions = np.arange(13, dtype=np.int32)[None]
    angles(Tensor(positions[:, :12]), Tensor(np.int32(12)))
    with pytest.raises(ValueError, match="max_length"):
        angles(Tensor(positions), Tensor(np.int32(13)))
