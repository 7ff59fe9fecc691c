"""config.json in MindFormers' keys and back; an HF folder as the checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_core.config import load_config
from llm_core.config.hf_folder import hf_config_to_model_config, is_hf_folder, model_config_to_hf, read_hf_config
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
        ({"model_type": "mistral"}, "model_type: 'mistral' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; it must be 'silu'"),
        ({"mlp_bias": True}, "mlp_bias: True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "magic": 1}}, "rope_scaling.magic"),
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
