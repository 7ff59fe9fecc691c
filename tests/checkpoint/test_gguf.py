"""GGUF files: the values that the gguf package and transformers read, rows put in order, bad input named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

import gguf_samples as samples  # noqa: E402

from llm_core.checkpoint.convert import to_hugging_face, to_mindformers  # noqa: E402
from llm_core.checkpoint.gguf_config import llama3_factors  # noqa: E402
from llm_core.checkpoint.weights import load_into, open_weights, read_weights  # noqa: E402
from llm_core.config import load_config  # noqa: E402
from llm_core.errors import UserError  # noqa: E402
from llm_core.models.spec import spec_from_config  # noqa: E402

ROOT = Path(__file__).parents[2]
QUANTIZED = [kind for kind in samples.KINDS if kind not in ("F32", "F16", "BF16")]


@pytest.mark.parametrize("kind", samples.KINDS)
def test_values_are_the_packages(tmp_path, kind):
    made = samples.tensors(kind)
    path = samples.write_gguf(tmp_path / "model.gguf", made)
    ours = read_weights(path)
    assert len(ours) == len(made)
    for theirs, name, heads in (
        ("token_embd.weight", "model.tok_embeddings.embedding_weight", None),
        ("output.weight", "lm_head.weight", None),
        ("blk.1.attn_q.weight", "model.layers.1.attention.wq.weight", samples.HEADS),
        ("blk.1.attn_k.weight", "model.layers.1.attention.wk.weight", samples.KV_HEADS),
        ("blk.1.attn_v.weight", "model.layers.1.attention.wv.weight", None),
        ("blk.1.attn_output.weight", "model.layers.1.attention.wo.weight", None),
        ("blk.0.ffn_gate.weight", "model.layers.0.feed_forward.w1.weight", None),
        ("blk.0.ffn_down.weight", "model.layers.0.feed_forward.w2.weight", None),
        ("blk.0.ffn_up.weight", "model.layers.0.feed_forward.w3.weight", None),
        ("blk.0.attn_norm.weight", "model.layers.0.attention_norm.weight", None),
        ("blk.0.ffn_norm.weight", "model.layers.0.ffn_norm.weight", None),
        ("output_norm.weight", "model.norm_out.weight", None),
    ):
        back = ours[name] if heads is None else samples.llama_cpp_order(ours[name], heads)
        np.testing.assert_array_equal(back, samples.dequantized(*made[theirs]), err_msg=name)
    assert open_weights(path).heads["lm_head.weight"].dtype.name == {
        "F16": "float16", "BF16": "bfloat16"
    }.get(kind, "float32")  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTIZED])
def test_the_folder_is_what_transformers_reads(tmp_path, kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    samples.write_gguf(tmp_path / "model.gguf", samples.tensors(kind))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    folder = to_hugging_face(tmp_path / "model.gguf", tmp_path / "folder")
    ours, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    for key in ("rope_theta", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours.config, key) == pytest.approx(getattr(theirs.config, key), rel=1e-6), key
    mine = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "tied"), [("Q4_1", True), ("Q6_K", False)])
def test_the_decoder_computes_what_transformers_computes(tmp_path, kind, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import mindspore as ms

    from llm_core.models.decoder import CausalLM

    samples.write_gguf(tmp_path / "model.gguf", samples.tensors(kind, tied=tied))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    folder = to_hugging_face(tmp_path / "model.gguf", tmp_path / "folder")
    loaded = load_config("configs/demo/predict_llama_demo.yaml", [("load_checkpoint", str(folder))])
    net = CausalLM(spec_from_config(loaded.config.model), seed=None)
    report = load_into(net, open_weights(folder))
    assert (report.missing, report.unexpected) == ([], [])
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    expected = theirs(torch.from_numpy(tokens).long()).logits.detach().numpy()
    np.testing.assert_allclose(net(ms.Tensor(tokens)).asnumpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_biases_are_put_in_order_too(tmp_path):
    made = samples.tensors(bias=True)
    path = samples.write_gguf(tmp_path / "model.gguf", made)
    ours = read_weights(path)
    bias = ours["model.layers.1.attention.wk.bias"]
    np.testing.assert_array_equal(samples.llama_cpp_order(bias, samples.KV_HEADS), made["blk.1.attn_k.bias"][0])
    config = json.loads((to_hugging_face(path, tmp_path / "folder") / "config.json").read_text())
    assert config["attention_bias"] is True
    del made["blk.1.attn_k.bias"]
    with pytest.raises(UserError, match="has 7 biases"):
        open_weights(samples.write_gguf(tmp_path / "part.gguf", made))


def test_the_config(tmp_path):
    fields = {
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0,
    }  # fmt: skip
    path = samples.write_gguf(tmp_path / "model.gguf", samples.tensors("Q8_0", tied=True), fields)
    folder = to_hugging_face(path, tmp_path / "folder", dtype="bf16")
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 256,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16",
    }  # fmt: skip


def test_llama3_positions(tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors = llama3_factors(samples.HEAD_DIM, 500000.0, scaling).astype(np.float32)
    made = samples.tensors("Q8_0") | {"rope_freqs.weight": (factors, "F32")}
    path = samples.write_gguf(tmp_path / "model.gguf", made, {"llama.rope.freq_base": 500000.0})
    folder = to_hugging_face(path, tmp_path / "folder")
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    made["rope_freqs.weight"] = (np.linspace(1, 8, samples.HEAD_DIM // 2).astype(np.float32), "F32")
    with pytest.raises(UserError, match="rope_freqs.weight: these factors"):
        open_weights(samples.write_gguf(tmp_path / "other.gguf", made))


@pytest.mark.parity
def test_llama3_factors_are_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain, _ = ROPE_INIT_FUNCTIONS["default"](config, "cpu") if "default" in ROPE_INIT_FUNCTIONS else (None, None)
    if plain is None:
        plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(np.asarray(plain) / scaled.numpy(), llama3_factors(128, 500000.0, scaling), rtol=1e-5)


def test_the_folder_says_whether_bos_stands_in_front(tmp_path):
    tokens = ["<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "ef", "gh"]
    tokenizer = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3, 3] + [1] * 30, "bos_token_id": 0,
        "merges": ["a b", "c d", "e f", "g h"], "eos_token_id": 1, "add_bos_token": False,
    }  # fmt: skip
    fields = {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    path = samples.write_gguf(tmp_path / "model.gguf", fields=fields)
    folder = to_hugging_face(path, tmp_path / "folder")
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    run = "configs/demo/predict_llama_demo.yaml"
    section = load_config(run, [("load_checkpoint", str(folder))]).config.processor.tokenizer
    assert section.vocab_file == str(folder / "tokenizer.json") and section.add_bos_token is False
    asked = [("load_checkpoint", str(folder)), ("processor.tokenizer.add_bos_token", "True")]
    assert load_config(run, asked).config.processor.tokenizer.add_bos_token is True


# ---- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "tools/convert_weight.py", "--model", "llama", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command(tmp_path):
    path = samples.write_gguf(tmp_path / "model.gguf", samples.tensors("Q4_1"))
    done = command("--input_path", path, "--output_path", tmp_path / "folder", "--dtype", "fp16")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"config.json", "model.safetensors"}
    assert "no tokenizer is written" in done.stdout + done.stderr
    assert open_weights(tmp_path / "folder").heads["lm_head.weight"].dtype.name == "float16"
    done = command("--input_path", path, "--output_path", tmp_path / "ours.safetensors")
    assert done.returncode == 0, done.stderr
    back = to_hugging_face(tmp_path / "ours.safetensors", tmp_path / "back")  # it remembers the config
    assert json.loads((back / "config.json").read_text())["rope_theta"] == 100000.0
    done = command("--input_path", tmp_path / "none.gguf", "--output_path", tmp_path / "x")
    assert done.returncode == 2 and "none.gguf" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


# ---- bad input


def test_a_run_wants_the_folder_made_of_it(tmp_path):
    """A YAML of matching sizes would compute with another rope theta, eps or head count."""
    path = samples.write_gguf(tmp_path / "model.gguf", samples.tensors("Q4_1"))
    command = f"convert_weight.py --model llama --input_path {path} --output_path FOLDER, and give FOLDER"
    with pytest.raises(UserError, match=f"load_checkpoint: {path}: a run would not .*{command}"):
        load_config("configs/demo/predict_llama_demo.yaml", [("load_checkpoint", str(path), "--load_checkpoint")])
    (tmp_path / "run.yaml").write_text(
        "context: {device_target: CPU}\nload_checkpoint: model.gguf\n"
        "model: {arch: {type: LlamaForCausalLM}, model_config: {type: LlamaConfig}}\n"
    )
    with pytest.raises(UserError, match="run.yaml:2: load_checkpoint: model.gguf: "):
        load_config(tmp_path / "run.yaml")


def test_a_file_that_is_cut_short(tmp_path):
    whole = samples.write_gguf(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "short.gguf"
    for size in (0, 3, 4, 11, 24, 30, 200, 900, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="short.gguf: (not a GGUF file|the file is cut short)"):
            open_weights(path)
        with pytest.raises(UserError):
            to_hugging_face(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98\n")
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        to_mindformers(tmp_path / "model.gguf", tmp_path / "a.safetensors")


def test_element_types(tmp_path):
    data = bytearray(samples.write_gguf(tmp_path / "model.gguf").read_bytes())
    name = b"blk.1.ffn_up.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions, and two of them
    data[place : place + 4] = (99).to_bytes(4, "little")
    (tmp_path / "future.gguf").write_bytes(data)
    with pytest.raises(UserError, match="element type 99"):
        open_weights(tmp_path / "future.gguf")
    made = samples.tensors() | {"blk.0.ffn_up.weight": (np.ones((256, 256), np.int32), "I32")}
    with pytest.raises(UserError, match="blk.0.ffn_up.weight has element type I32; supported are F32,"):
        open_weights(samples.write_gguf(tmp_path / "ints.gguf", made))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count = 8: not supported"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window = 4096"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type: 'longrope' is not supported"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count: 32 is not supported; it must be 64"),
        ({"llama.attention.head_count": 8, "llama.rope.dimension_count": 32, "llama.attention.key_length": 64},
         "32 is not supported"),
        ({"llama.attention.head_count_kv": 4}, "wk.weight has 128 rows, but 4 heads of 64 need 256"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)  # fmt: skip
def test_what_the_metadata_may_not_say(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        open_weights(samples.write_gguf(tmp_path / "model.gguf", fields=fields))


def test_another_architecture(tmp_path):
    path = samples.write_gguf(tmp_path / "model.gguf", architecture="gemma")
    with pytest.raises(UserError, match="general.architecture: 'gemma' is not supported; it must be 'llama'"):
        open_weights(path)


def test_a_tensor_of_something_else(tmp_path):
    made = samples.tensors() | {"blk.0.ffn_gate_exps.weight": (np.ones((4, 4), np.float32), "F32")}
    with pytest.raises(UserError, match="tensor blk.0.ffn_gate_exps.weight belongs to no Llama"):
        open_weights(samples.write_gguf(tmp_path / "model.gguf", made))


def test_layers_that_are_missing(tmp_path):
    path = samples.write_gguf(tmp_path / "model.gguf", fields={"llama.block_count": 3})
    with pytest.raises(UserError, match="num_hidden_layers is 3, but .* has 2"):
        to_hugging_face(path, tmp_path / "folder")


def test_without_the_package(tmp_path, monkeypatch):
    path = samples.write_gguf(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="needs the package gguf: pip install gguf"):
        open_weights(path)
