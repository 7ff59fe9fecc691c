"""Hugging Face folders of every family: loaded as they are they compute what transformers computes, and go both ways.

Falcon, Llama, Mistral and Qwen2 are made by transformers. It has neither InternLM: the first generation is a Llama
with biases under the same names, so its oracle is that Llama; InternLM2 is a Llama whose query, key and value are
packed together, so its folder is packed here, row by row, from a Llama that is the oracle.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import assert_same, write

from llm_core.checkpoint.convert import to_hugging_face, to_mindformers
from llm_core.checkpoint.files import open_tensor_file
from llm_core.checkpoint.hf import from_hf, is_parameter, parts_of_fused, to_hf
from llm_core.checkpoint.hf_fused import HfView, QkvLayout
from llm_core.checkpoint.weights import load_into, open_weights, read_weights
from llm_core.config import load_config
from llm_core.errors import UserError
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import spec_from_config

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
_FORTY = {"new_decoder_architecture": True, "num_kv_heads": 2}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
SHORT = {"max_position_embeddings": 16, "rope_scaling": DYNAMIC}
# name -> (HF's class, its configuration); a leading "internlm" is made from the Llama
CASES = {
    "llama": ("Llama", LLAMA),
    "yi": ("Llama", LLAMA | {"rope_theta": 5e6, "num_key_value_heads": 1}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": 12}),
    "mistral_wide_window": ("Mistral", LLAMA | {"sliding_window": 64}),
    "qwen2": ("Qwen2", LLAMA | {"rope_theta": 1e6}),
    "qwen2_tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "falcon_rw": ("Falcon", SIZES | _RW),
    "falcon_7b": ("Falcon", SIZES),
    "falcon_40b": ("Falcon", SIZES | _FORTY | {"tie_word_embeddings": False}),
    "falcon_11b": ("Falcon", SIZES | _FORTY | {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 40}),
    "falcon_dynamic": ("Falcon", SIZES | SHORT),
    "internlm_7b": ("Llama", LLAMA | {"attention_bias": True, "num_key_value_heads": 4}),
    "internlm_20b": ("Llama", LLAMA | SHORT | {"num_key_value_heads": 4}),
    "internlm2": ("Llama", LLAMA | SHORT),
    "internlm2_bias": ("Llama", LLAMA | {"attention_bias": True}),
}  # fmt: skip
LENGTH = 24  # beyond the trained length of the dynamic cases


def hf_model(name: str):
    """A random model of the case; its biases and norms are not left at zero and one."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    family, fields = CASES[name]
    config = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, float("norm" in key or ".ln_" in key) * key.endswith("weight"), 0.2)
        else:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model


def save(name: str, model, folder: Path) -> None:
    """The folder as the family's own code would save it."""
    model.save_pretrained(folder, max_shard_size="20KB")
    if not name.startswith("internlm"):
        return
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias", "head_dim")}
    config |= {"bias": CASES[name][1].get("attention_bias", False)}
    scaling = config.pop("rope_scaling")
    if name.startswith("internlm2"):
        config |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
        config["rope_scaling"] = {"type": "dynamic", "factor": 2.0} if scaling else None
        _pack(folder, config)
    else:
        rotary = {"base": config.pop("rope_theta"), "type": "dynamic" if scaling else "origin"}
        config |= {"rotary": rotary | ({"scaling_factor": 2.0} if scaling else {})}
        config |= {"architectures": ["InternLMForCausalLM"], "model_type": "internlm"}
    (folder / "config.json").write_text(json.dumps(config))


def _pack(folder: Path, config: dict) -> None:
    """Llama's files as InternLM2's: for each key/value head its queries' rows, the key's, the value's."""
    tensors = read_raw(folder)
    for file in folder.glob("model*"):
        file.unlink()
    groups, width = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    each = config["num_attention_heads"] // groups
    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    packed = {}
    for name, array in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            q, k, v = (tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj"))
            rows = []
            for group in range(groups):
                rows += [q[group * each * width : (group + 1) * each * width]]
                rows += [part[group * width : (group + 1) * width] for part in (k, v)]
            packed[name.replace("self_attn.q_proj", "attention.wqkv")] = np.concatenate(rows)
            continue
        for theirs, theirs_packed in names.items():
            name = name.replace(theirs, theirs_packed) if theirs in name else name
        packed[name] = array
    write(folder / "model.safetensors", packed)


def read_raw(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files, under the names in the files."""
    files = [open_tensor_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    return {name: file.read(name) for file in files for name in file.heads}


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of the network that a run over this folder builds and loads."""
    import mindspore as ms

    from llm_core.models.decoder import CausalLM

    ms.set_context(mode=ms.GRAPH_MODE)
    given = [("load_checkpoint", str(folder)), ("model.model_config.seq_length", str(LENGTH))]
    spec = spec_from_config(load_config("predict_llama2_7b", given).config.model)
    net = CausalLM(spec, seed=None)
    report = load_into(net, open_weights(folder), source=folder)
    assert not report.missing and not report.unexpected
    return net(ms.Tensor(tokens)).asnumpy()


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_a_folder_computes_what_it_computes_there(tmp_path, name):
    torch = pytest.importorskip("torch")
    model = hf_model(name)
    save(name, model, tmp_path)
    tokens = (np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH) * 7 + 3) % 64
    expected = model(torch.from_numpy(tokens).long()).logits.detach().numpy()
    assert np.abs(our_logits(tmp_path, tokens) - expected).max() < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path, name, suffix):
    """Into MindFormers' form and back: the same names, bits and configuration; joined projections change nothing."""
    model = hf_model(name)
    folder = tmp_path / "hf"
    save(name, model, folder)
    family = json.loads((folder / "config.json").read_text())["model_type"]
    ours = to_mindformers(folder, tmp_path / f"ours{suffix}", qkv_concat=suffix == ".ckpt", family=family)
    assert all(is_parameter(key) or "w_qkv" in key or "w_gate" in key for key in read_weights(ours))
    back = to_hugging_face(ours, tmp_path / "back", config=folder, max_shard_size=3000, family=family)
    assert_same(read_raw(back), read_raw(folder))
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    assert {key: value for key, value in after.items() if before.get(key) != value} == {
        key: value for key, value in {"tie_word_embeddings": after["tie_word_embeddings"]}.items() if key not in before
    }
    if not name.startswith("internlm"):
        again, info = type(model).from_pretrained(back, output_loading_info=True)
        assert not any(info.values())
        for (key, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
            assert one.equal(other), key


# ---- names and layouts, without torch


def test_fused_projections_are_split_head_by_head():
    """Rows numbered by what the layout says they are come out sorted by query, key and value head."""
    rows = {
        (4, 2): "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3",
        (1, 3): "q0 q1 q2 q3 k0 v0",
        (2, 2): "q0 q1 k0 v0 q2 q3 k1 v1",
    }
    for (kv_heads, width), order in rows.items():
        heads, layout = np.array(order.split()), QkvLayout(kv_heads, width)
        fused = np.repeat(heads, width)
        parts = [layout.part(fused, index) for index in range(3)]
        for letter, part in zip("qkv", parts, strict=True):
            assert list(part[::width]) == sorted(head for head in heads if head[0] == letter)
        np.testing.assert_array_equal(layout.join(*parts), fused)
        assert layout.rows(len(fused)) == tuple(len(part) for part in parts)
    assert QkvLayout(2, 8).rows(40) is None and QkvLayout(4, 8).rows(64) is None


def test_names_of_every_family():
    q, norm = "model.layers.7.attention.wq.bias", "model.layers.7.ffn_norm.weight"
    assert to_hf(q, "qwen2") == "model.layers.7.self_attn.q_proj.bias"
    assert to_hf(q, "internlm2") == "model.layers.7.attention.wqkv.bias"
    assert to_hf(q, "falcon") == "transformer.h.7.self_attention.query_key_value.bias"
    assert to_hf(norm, "falcon") == "transformer.h.7.post_attention_layernorm.weight"
    assert to_hf(norm, "falcon", two_norms=True) == "transformer.h.7.ln_mlp.weight"
    assert from_hf("transformer.h.7.ln_mlp.weight") == norm == to_hf(norm, "internlm2")
    assert to_hf("model.layers.0.feed_forward.w3.weight", "falcon") is None
    fused = parts_of_fused("transformer.h.3.self_attention.query_key_value.weight")
    assert fused == [f"model.layers.3.attention.{part}.weight" for part in ("wq", "wk", "wv")]
    assert parts_of_fused("model.layers.3.attention.wqkv.bias")[2] == "model.layers.3.attention.wv.bias"
    assert parts_of_fused("transformer.h.3.mlp.dense_h_to_4h.weight") == []


FALCON = {"model_type": "falcon", **SIZES, **_FORTY}
SHAPES = {
    "transformer.h.0.self_attention.query_key_value.weight": (64, 32),
    "transformer.word_embeddings.weight": (64, 32),
}


def falcon_folder(folder: Path, config: dict | None = FALCON) -> Path:
    folder.mkdir()
    write(folder / "model.safetensors", {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_is_fused_needs_its_config(tmp_path):
    assert open_weights(falcon_folder(tmp_path / "a")).heads["model.layers.0.attention.wk.weight"].shape == (16, 32)
    with pytest.raises(UserError, match=r"query_key_value\.weight holds query, key and value in one.*config\.json"):
        open_weights(falcon_folder(tmp_path / "b", None))
    with pytest.raises(UserError, match="has 64 rows, which does not fit the 3 key/value heads of 8"):
        open_weights(falcon_folder(tmp_path / "c", FALCON | {"num_kv_heads": 3}))


def test_the_family_must_be_the_configurations(tmp_path):
    folder = falcon_folder(tmp_path / "a")
    with pytest.raises(UserError, match="--model llama: .*config.json says model_type 'falcon'"):
        to_mindformers(folder, tmp_path / "x.ckpt", family="llama")
    with pytest.raises(UserError, match="not a whole model's"):
        to_hugging_face(folder, tmp_path / "back", config=folder)
    with pytest.raises(UserError, match="w3.*falcon of Hugging Face has no such parameter"):
        HfView({"model.layers.0.feed_forward.w3.weight": np.ones((2, 2))}, "falcon", QkvLayout(1, 2))
    with pytest.raises(UserError, match=r"wk\.weight.*is missing"):
        HfView({"model.layers.0.attention.wq.weight": np.ones((2, 2))}, "falcon", QkvLayout(1, 2))


# ---- the command, from a YAML


def command(*arguments) -> subprocess.CompletedProcess:
    tool = Path(__file__).parents[2] / "tools" / "convert_weight.py"
    return subprocess.run([sys.executable, str(tool), *map(str, arguments)], capture_output=True, text=True)


YAML = """
model:
  arch: {{type: {family}ForCausalLM}}
  model_config:
    {{type: {family}Config, hidden_size: 32, num_heads: 4, num_layers: 1, vocab_size: 64, seq_length: 32{more}}}
"""


@pytest.mark.parametrize(
    ("model", "family", "more", "says"),
    [
        ("internlm", "InternLM", "", {"bias": True, "rotary": {"base": 10000.0, "type": "origin"}}),
        ("internlm2", "Llama", ", n_kv_heads: 2, has_bias: True", {"bias": True, "num_key_value_heads": 2}),
        ("qwen2", "Llama", ", n_kv_heads: 2, qkv_has_bias: True", {"use_sliding_window": False}),
        ("mistral", "Llama", ", n_kv_heads: 2", {"sliding_window": None}),
        ("falcon", "Falcon", ", new_decoder_architecture: True, num_kv_heads: 2", {"num_kv_heads": 2, "bias": False}),
    ],
)
def test_a_run_of_ours_in_the_form_of_its_family(tmp_path, model, family, more, says):
    """What a training wrote, with its YAML, becomes the family's folder; that folder loads, bit for bit."""
    run = tmp_path / "run.yaml"
    run.write_text(YAML.format(family=family, more=more))
    shapes = parameter_shapes(spec_from_config(load_config(run).config.model))
    rng = np.random.default_rng(0)
    ours = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    write(tmp_path / "ours.safetensors", ours)
    common = ("--model", model, "--input_path", tmp_path / "ours.safetensors", "--reversed", "--config", run)
    done = command(*common, "--output_path", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == model and config | says == config
    assert_same(read_weights(tmp_path / "hf"), ours)
    loaded = load_config(run, [("load_checkpoint", str(tmp_path / "hf"))]).config.model
    assert parameter_shapes(spec_from_config(loaded)) == shapes
    back = command("--model", model, "--input_path", tmp_path / "hf", "--output_path", tmp_path / "back.ckpt")
    assert back.returncode == 0, back.stderr
    assert_same(read_weights(tmp_path / "back.ckpt"), ours)


def test_the_command_names_what_does_not_go_together(tmp_path):
    folder = falcon_folder(tmp_path / "a")
    done = command("--model", "mistral", "--input_path", folder, "--output_path", tmp_path / "x.ckpt")
    assert done.returncode == 2 and "give --model falcon" in done.stderr and "Traceback" not in done.stderr
    done = command("--model", "yi", "--input_path", folder, "--output_path", tmp_path / "x.ckpt")
    assert done.returncode == 2 and "invalid choice: 'yi'" in done.stderr
