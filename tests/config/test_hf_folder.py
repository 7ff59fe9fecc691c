"""config.json in MindFormers' keys and back; an HF folder as the checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_core.config import load_config
from llm_core.config.hf_export import model_config_to_hf
from llm_core.config.hf_folder import hf_config_to_model_config, is_hf_folder, qkv_grouping, read_hf_config
from llm_core.config.hf_keys import FAMILIES, IGNORED, ONLY
from llm_core.errors import UserError

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY))
    (path / "tokenizer.model").write_bytes(b"x")
    return path


# ---- in a run ----


def test_architecture_comes_from_the_folder(folder: Path) -> None:
    loaded = load_config("predict_llama2_7b", [("load_checkpoint", str(folder))])
    config = loaded.config.model.config
    assert (config.hidden_size, config.num_layers, config.num_heads, config.n_kv_heads) == (64, 5, 8, 4)
    assert (config.seq_length, config.max_position_embedding, config.vocab_size) == (512, 512, 512)
    assert config.tie_word_embeddings and config.intermediate_size == 172 and config.rms_norm_eps == 1e-6
    assert (config.top_k, config.max_decode_length) == (3, 512)  # generation keys stay the YAML's
    assert config.pad_token_id == 0  # config.json is silent, so is what the YAML says
    assert loaded.config.processor.tokenizer.vocab_file == str(folder / "tokenizer.model")
    assert loaded.origins["model.model_config.hidden_size"] == str(folder / "config.json")
    notes = [note for note in loaded.notes if note.startswith(str(folder))]
    assert len(notes) == 1
    assert "hidden_size 4096 -> 64" in notes[0] and "processor.tokenizer.vocab_file" in notes[0]
    assert "bos_token_id" not in notes[0] and "theta" not in notes[0]  # unchanged


def test_command_line_wins_over_the_folder(folder: Path) -> None:
    overrides = [
        ("load_checkpoint", str(folder)),
        ("model.model_config.seq_length", "128"),
        ("processor.tokenizer.vocab_file", "mine.model"),
        ("model.model_config.max_new_tokens", "9"),
    ]
    loaded = load_config("predict_llama2_7b", overrides)
    assert loaded.config.model.config.seq_length == 128 and loaded.config.model.config.max_new_tokens == 9
    assert loaded.config.processor.tokenizer.vocab_file == "mine.model"
    note = next(note for note in loaded.notes if note.startswith(str(folder)))
    assert "seq_length" not in note and "vocab_file" not in note


def test_nothing_of_another_model_shines_through(folder: Path) -> None:
    """The 70B file has grouped heads and a wider feed-forward; a config.json that is silent means HF's defaults."""
    hf = {key: value for key, value in TINY.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    (folder / "config.json").write_text(json.dumps(hf))
    config = load_config("predict_llama2_70b", [("load_checkpoint", str(folder))]).config.model.config
    assert config.n_kv_heads == 8 == config.num_heads and config.ffn_dim_multiplier is None
    assert config.rms_norm_eps == 1e-6


def test_rope_parameters_of_the_yaml_are_replaced(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "model:\n  arch: {type: LlamaForCausalLM}\n  model_config:\n    type: LlamaConfig\n    extend_method: YARN\n"
        f"    scaling_factor: {{factor: 4, beta_fast: 16}}\nload_checkpoint: {folder}\n"
    )
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps({**TINY, "rope_scaling": scaling}))
    config = load_config(run).config.model.config
    assert config.extend_method == "LLAMA3"
    assert config.scaling_factor == {key: value for key, value in scaling.items() if key != "rope_type"}


def test_tokenizer_json_is_taken_where_there_is_no_model_file(folder: Path) -> None:
    (folder / "tokenizer.model").rename(folder / "tokenizer.json")
    config = load_config("predict_llama2_7b", [("load_checkpoint", str(folder))]).config
    assert config.processor.tokenizer.vocab_file == str(folder / "tokenizer.json")


# ---- config.json ----


def test_is_hf_folder(folder: Path, tmp_path: Path) -> None:
    assert is_hf_folder(folder) and not is_hf_folder(tmp_path) and not is_hf_folder(folder / "config.json")
    (folder / "config.json").write_text('{"something": "else"}')
    assert not is_hf_folder(folder)


def test_broken_config_json(folder: Path) -> None:
    (folder / "config.json").write_text('{\n"hidden_size" 3}')
    with pytest.raises(UserError, match=r"config.json:2: not valid JSON"):
        load_config("predict_llama2_7b", [("load_checkpoint", str(folder))])
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="must be a JSON object"):
        read_hf_config(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; it must be 'silu'"),
        ({"mlp_bias": True}, "mlp_bias: True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "magic": 1}}, "rope_scaling.magic"),
        ({"rope_scaling": {**DYNAMIC, "original_max_position_embeddings": 64}}, "rope_scaling.original_max_position"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported; it must be 1.0"),
        ({"logit_scale": 2.0}, "logit_scale: not a known key of Llama, so its value 2.0 might change"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "architectures: 'LlavaLlamaForCausalLM'"),
        ({"sliding_window": 64}, "sliding_window: not a known key of Llama"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        hf_config_to_model_config({**TINY, **change})


@pytest.mark.parametrize(
    ("hf", "method", "factor"),
    [
        (None, "None", 1.0),
        ({"rope_type": "default"}, "None", 1.0),
        ({"type": "linear", "factor": 2.0}, "PI", 2.0),
        ({"type": "dynamic", "factor": 3.0}, "DYNAMIC_NTK", 3.0),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            "YARN",
            {"factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rope_scaling(hf: dict | None, method: str, factor: object) -> None:
    config = hf_config_to_model_config({**TINY, "rope_scaling": hf})
    assert (config["extend_method"], config["scaling_factor"]) == (method, factor)


def test_rope_parameters_of_newer_files() -> None:
    hf = {key: value for key, value in TINY.items() if key != "rope_theta"}
    config = hf_config_to_model_config({**hf, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}})
    assert config["theta"] == 500000.0 and config["extend_method"] == "None"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 8},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
        {"eos_token_id": [2, 7], "pad_token_id": 0},
    ],
)
def test_there_and_back(change: dict) -> None:
    """Every key of config.json that both sides know survives the way through our keys."""
    hf = {**TINY, **change}
    ours = hf_config_to_model_config(hf)
    back = model_config_to_hf({"pad_token_id": -1, **ours}, intermediate_size=ours["intermediate_size"])
    for key, value in hf.items():
        assert back[key] == value, key
    assert back["pad_token_id"] == hf.get("pad_token_id")


def test_what_hf_cannot_say_is_refused() -> None:
    ours = {**hf_config_to_model_config(TINY), "pad_token_id": 0}
    with pytest.raises(UserError, match="qkv_has_bias"):
        model_config_to_hf({**ours, "qkv_has_bias": True}, intermediate_size=172)
    with pytest.raises(UserError, match="extend_method NTK"):
        model_config_to_hf({**ours, "extend_method": "NTK"}, intermediate_size=172)


@pytest.mark.parity
def test_transformers_reads_what_is_written() -> None:
    transformers = pytest.importorskip("transformers")
    ours = {**hf_config_to_model_config(TINY), "pad_token_id": 0}
    config = transformers.LlamaConfig.from_dict(model_config_to_hf(ours, intermediate_size=172))
    assert (config.hidden_size, config.num_key_value_heads, config.head_dim, config.rope_theta) == (64, 4, 8, 10000.0)


# ---- the other families ----

MISTRAL = {**TINY, "model_type": "mistral", "sliding_window": None}
QWEN2 = {**TINY, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2}
_ABSENT = ("rope_theta", "head_dim", "num_key_value_heads")
INTERNLM = {key: value for key, value in TINY.items() if key not in _ABSENT} | {
    "model_type": "internlm", "bias": True, "rotary": {"base": 10000, "type": "origin"},
}  # fmt: skip
INTERNLM2 = {key: value for key, value in TINY.items() if key != "head_dim"} | {
    "model_type": "internlm2", "bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "attn_implementation": "eager", "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
}  # fmt: skip
FALCON = {
    "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 512,
    "alibi": False, "attention_dropout": 0.0, "hidden_dropout": 0.0, "apply_residual_connection_post_layernorm": False,
    "layer_norm_epsilon": 1e-5, "bos_token_id": 11, "eos_token_id": 11, "tie_word_embeddings": True,
}  # fmt: skip


def test_every_key_has_one_meaning() -> None:
    for name, family in FAMILIES.items():
        tables = [set(family.keys), set(family.only), set(family.special), set(ONLY), set(IGNORED)]
        assert sum(map(len, tables)) == len(set().union(*tables)), name


@pytest.mark.parametrize(
    ("hf", "biases"),
    [
        (MISTRAL, (False, False)),
        (QWEN2, (True, False)),
        (INTERNLM, (False, True)),
        ({**INTERNLM, "bias": False}, (False, False)),
        (INTERNLM2, (False, False)),
    ],
)
def test_llama_shaped_families(hf: dict, biases: tuple) -> None:
    ours = hf_config_to_model_config(hf)
    assert (ours["qkv_has_bias"], ours["has_bias"]) == biases
    assert (ours["hidden_size"], ours["num_layers"], ours["intermediate_size"]) == (64, 5, 172)
    assert ours["type"] == ("InternLMConfig" if hf["model_type"] == "internlm" else "LlamaConfig")
    back = model_config_to_hf({"pad_token_id": -1, **ours}, intermediate_size=172, family=hf["model_type"])
    unused = {*IGNORED, "sliding_window", "max_window_layers"}
    wanted = {key: value for key, value in hf.items() if key not in unused}
    assert {key: back[key] for key in wanted} == wanted
    assert hf_config_to_model_config(back) == ours | {"initializer_range": 0.02}


def test_rotary_of_internlm() -> None:
    ours = hf_config_to_model_config({**INTERNLM, "rotary": {"base": 500, "type": "dynamic", "scaling_factor": 2.0}})
    assert (ours["theta"], ours["extend_method"], ours["scaling_factor"]) == (500.0, "DYNAMIC_NTK", 2.0)
    silent = hf_config_to_model_config({key: value for key, value in INTERNLM.items() if key != "rotary"})
    assert (silent["theta"], silent["extend_method"], silent["scaling_factor"]) == (10000.0, "DYNAMIC_NTK", 1.0)


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        ({**MISTRAL, "sliding_window": 256}, "sliding_window: 256 is not supported for a context of 512"),
        ({key: value for key, value in MISTRAL.items() if key != "sliding_window"} | {"max_position_embeddings": 8192},
         "sliding_window: 4096"),  # HF's default
        ({**QWEN2, "use_sliding_window": True}, "sliding_window: 64"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias: True is not supported; it must be False"),
        ({**INTERNLM, "rotary": {"base": 1, "type": "linear"}}, "rotary"),
        ({**INTERNLM, "num_key_value_heads": 4}, "num_key_value_heads"),
        ({**INTERNLM2, "head_dim": 16}, "head_dim: not a known key of InternLM2"),
        ({**FALCON, "activation": "relu"}, "activation: 'relu' is not supported; it must be 'gelu'"),
        ({**FALCON, "new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
        ({**FALCON, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn: 2 needs new_decoder"),
        ({**FALCON, "multi_query": False, "num_kv_heads": 2}, "num_kv_heads: 2 needs new_decoder"),
        ({**FALCON, "n_head": 8}, "n_head: not a known key of Falcon"),
    ],
)  # fmt: skip
def test_what_a_family_does_not_compute_is_refused_by_name(hf: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        hf_config_to_model_config(hf)


def test_a_window_that_no_text_meets() -> None:
    assert hf_config_to_model_config({**MISTRAL, "sliding_window": 512})["seq_length"] == 512
    short = hf_config_to_model_config({**MISTRAL, "sliding_window": 256}, seq_length=200)
    assert short["max_position_embedding"] == 256
    assert hf_config_to_model_config({**QWEN2, "use_sliding_window": True, "max_window_layers": 5})["num_layers"] == 5


def test_a_window_and_a_shorter_run(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**MISTRAL, "sliding_window": 256}))
    with pytest.raises(UserError, match=r"add --model\.model_config\.seq_length 256"):
        load_config("predict_llama2_7b", [("load_checkpoint", str(folder))])
    given = [("load_checkpoint", str(folder)), ("model.model_config.seq_length", "256")]
    config = load_config("predict_llama2_7b", given).config.model.config
    assert (config.seq_length, config.max_position_embedding) == (256, 256)


@pytest.mark.parametrize(
    ("change", "grouping", "residual"),
    [
        ({"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}, (8, 8), "sequential"),
        ({"num_kv_heads": 8}, (1, 8), "parallel"),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, (2, 8), "parallel_two_norms"),
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, (2, 8), "parallel"),
    ],
)
def test_falcons(folder: Path, change: dict, grouping: tuple, residual: str) -> None:
    """The folder's keys make the spec, from whatever YAML the run comes; and the way back says the same."""
    from llm_core.models.spec import spec_from_config

    hf = {**FALCON, **change}
    (folder / "config.json").write_text(json.dumps(hf))
    loaded = load_config("predict_llama2_7b", [("load_checkpoint", str(folder))])
    spec = spec_from_config(loaded.config.model)
    assert (spec.residual, spec.num_kv_heads, spec.head_dim) == (residual, *qkv_grouping(hf))
    assert qkv_grouping(hf) == grouping
    assert (spec.ffn_size, spec.norm, spec.mlp, spec.tied_head) == (256, "layer", "gelu", True)
    assert (spec.position, spec.qkv_bias) == ("alibi" if hf["alibi"] else "rope", hf.get("bias", False))
    assert loaded.config.model.arch.type == "FalconForCausalLM" and loaded.config.model.config.eos_token_id == 11
    ours = hf_config_to_model_config(hf)
    back = model_config_to_hf({"pad_token_id": -1, **ours}, intermediate_size=256)
    assert hf_config_to_model_config(back) | {"ffn_hidden_size": None} == ours | {"initializer_range": 0.02}


def test_the_head_that_a_run_asks_for_stays(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "model:\n  arch: {type: LlamaForSequenceClassification}\n  model_config: {type: LlamaConfig}\n"
        f"load_checkpoint: {folder}\n"
    )
    (folder / "config.json").write_text(json.dumps(FALCON))
    assert load_config(run).config.model.arch.type == "FalconForSequenceClassification"


def test_what_another_family_cannot_say() -> None:
    ours = {**hf_config_to_model_config(TINY), "pad_token_id": 0}
    with pytest.raises(UserError, match="Mistral has no biases"):
        model_config_to_hf({**ours, "has_bias": True}, intermediate_size=172, family="mistral")
    with pytest.raises(UserError, match="Qwen2 has biases on query, key and value"):
        model_config_to_hf(ours, intermediate_size=172, family="qwen2")
    with pytest.raises(UserError, match="n_kv_heads"):
        model_config_to_hf(ours, intermediate_size=172, family="internlm")
    with pytest.raises(UserError, match="extend_method YARN: Hugging Face's InternLM2"):
        model_config_to_hf({**ours, "extend_method": "YARN"}, intermediate_size=172, family="internlm2")
    with pytest.raises(UserError, match="--model falcon: the configuration is a LlamaConfig"):
        model_config_to_hf(ours, intermediate_size=172, family="falcon")


# What config.json of published models says (names, types and the like left out) -> the number of their parameters.
PUBLISHED = {
    "internlm-20b": (
        {
            "model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": False, "hidden_act": "silu",
            "hidden_size": 5120, "intermediate_size": 13824, "max_position_embeddings": 4096, "num_hidden_layers": 60,
            "num_attention_heads": 40, "num_key_value_heads": 40, "pretraining_tp": 1, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "vocab_size": 103168, "rotary": {"base": 10000, "type": "dynamic"},
        },
        20_088_714_240,
    ),
    "internlm2-7b": (
        {
            "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False, "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0}, "vocab_size": 92544, "attn_implementation": "eager",
        },
        7_737_708_544,
    ),
    "qwen2-7b": (
        {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
            "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False,
            "use_mrope": False, "tie_word_embeddings": False, "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "mistral-7b-v0.3": (
        {
            "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        },
        7_248_023_552,
    ),
    "yi-6b": (
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 64000,
            "rms_norm_eps": 1e-5, "rope_theta": 5000000.0, "rope_scaling": None, "tie_word_embeddings": False,
        },
        6_061_035_520,
    ),
    "falcon-7b": (
        {
            "model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False,
            "attention_dropout": 0.0, "hidden_dropout": 0.0, "hidden_size": 4544, "layer_norm_epsilon": 1e-5,
            "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71, "parallel_attn": True,
            "num_hidden_layers": 32, "vocab_size": 65024, "bos_token_id": 11, "eos_token_id": 11,
        },
        6_921_720_704,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name: str) -> None:
    from llm_core.config.model_section import ModelSection
    from llm_core.models.spec import spec_from_config

    hf, parameters = PUBLISHED[name]
    ours = hf_config_to_model_config(hf)
    arch = {"type": f"{ours['type'].removesuffix('Config')}ForCausalLM"}
    spec = spec_from_config(ModelSection.model_validate({"arch": arch, "model_config": ours}))
    assert spec.num_parameters == parameters
