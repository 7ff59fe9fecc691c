"""tools/convert_weight.py: bit-equal there and back, rounded as torch rounds, whole or absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import FFN, HIDDEN, LAYERS, VOCAB, assert_same, hf_names, joined, llama, write

from llm_core.checkpoint.convert import to_hugging_face, to_mindformers
from llm_core.checkpoint.files import open_tensor_file, read_heads
from llm_core.checkpoint.manifest import verified_version
from llm_core.checkpoint.weights import open_weights, read_weights
from llm_core.errors import EnvironmentFault, UserError

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def hf_folder(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    write(folder / "model.safetensors", hf_names(llama()))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def read_raw(folder):
    """All tensors of a folder's safetensors files, under the names in the files."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        file = open_tensor_file(path)
        tensors |= {name: file.read(name) for name in file.heads}
    return tensors


@pytest.mark.parametrize("qkv_concat", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("shard", [10**9, 800])
def test_there_and_back_is_bit_equal(tmp_path, hf_folder, suffix, qkv_concat, shard):
    ours = to_mindformers(hf_folder, tmp_path / f"ours{suffix}", qkv_concat=qkv_concat)
    assert_same(read_weights(ours), joined(llama()) if qkv_concat else llama())
    assert verified_version(ours) is not None
    theirs = to_hugging_face(ours, tmp_path / "back", config=hf_folder, max_shard_size=shard)
    assert_same(read_raw(theirs), hf_names(llama()))
    assert json.loads((theirs / "config.json").read_text()) == CONFIG
    files = sorted(path.name for path in theirs.iterdir())
    if shard > 10**6:
        assert files == ["config.json", "model.safetensors"]
    else:
        index = json.loads((theirs / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}
        assert len(files) > 4 and index["metadata"]["total_size"] == sum(a.nbytes for a in llama().values())
    assert_same(read_weights(theirs), llama())


def test_a_safetensors_file_remembers_its_config(tmp_path, hf_folder):
    ours = to_mindformers(hf_folder, tmp_path / "ours.safetensors")
    theirs = to_hugging_face(ours, tmp_path / "back")
    assert json.loads((theirs / "config.json").read_text()) == CONFIG
    again = to_mindformers(ours, tmp_path / "again.safetensors", "bf16")
    theirs = to_hugging_face(again, tmp_path / "back2")
    assert json.loads((theirs / "config.json").read_text()) == CONFIG | {"torch_dtype": "bfloat16"}


def test_the_config_is_needed_and_must_fit(tmp_path, hf_folder):
    ours = to_mindformers(hf_folder, tmp_path / "ours.ckpt")
    with pytest.raises(UserError, match="--config"):
        to_hugging_face(ours, tmp_path / "back")
    (hf_folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="num_hidden_layers is 3, but .* has 2"):
        to_hugging_face(ours, tmp_path / "back", config=hf_folder / "config.json")
    assert not (tmp_path / "back").exists()


def test_the_config_of_a_yaml(tmp_path, hf_folder):
    ours = to_mindformers(hf_folder, tmp_path / "ours.ckpt")
    path = tmp_path / "model.yaml"
    path.write_text(
        f"""
trainer:
  type: CausalLanguageModelingTrainer
  model_name: tiny
model:
  arch:
    type: LlamaForCausalLM
  model_config:
    type: LlamaConfig
    hidden_size: {HIDDEN}
    num_layers: {LAYERS}
    num_heads: 4
    n_kv_heads: 2
    vocab_size: {VOCAB}
    intermediate_size: {FFN}
    seq_length: 32
    rms_norm_eps: 1.0e-5
"""
    )
    theirs = to_hugging_face(ours, tmp_path / "back", config=path)
    config = json.loads((theirs / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[key] == CONFIG[key], key


def test_tied_heads_stay_tied(tmp_path):
    weights = llama(tied=True)
    folder = tmp_path / "hf"
    folder.mkdir()
    write(folder / "model.safetensors", hf_names(weights))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    ours = to_mindformers(folder, tmp_path / "ours.safetensors")
    assert "lm_head.weight" not in read_weights(ours)
    theirs = to_hugging_face(ours, tmp_path / "back")
    assert json.loads((theirs / "config.json").read_text())["tie_word_embeddings"] is True
    assert_same(read_raw(theirs), hf_names(weights))


@pytest.mark.parity
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_types_round_as_torch_does(tmp_path, hf_folder, suffix, dtype, name):
    torch = pytest.importorskip("torch")
    ours = to_mindformers(hf_folder, tmp_path / f"ours{suffix}", dtype)
    assert {head.dtype.name for head in read_heads(ours).values()} == {name}
    for key, array in read_weights(ours).items():
        expected = torch.from_numpy(llama()[key]).to(getattr(torch, name)).float().numpy()
        np.testing.assert_array_equal(array, expected, err_msg=key)
    wide = to_mindformers(ours, tmp_path / f"wide{suffix}", "fp32")
    back = to_mindformers(wide, tmp_path / f"back{suffix}", dtype)
    assert_same(read_weights(back), read_weights(ours))


@pytest.mark.parity
@pytest.mark.parametrize("shards", [1, 2])
def test_torch_bin_folders(tmp_path, shards):
    torch = pytest.importorskip("torch")
    theirs = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in hf_names(llama()).items()}
    names = list(theirs)
    if shards == 1:
        torch.save(theirs, tmp_path / "pytorch_model.bin")
    else:
        index = {}
        for part in range(shards):
            file = f"pytorch_model-{part + 1:05d}-of-{shards:05d}.bin"
            torch.save({name: theirs[name] for name in names[part::shards]}, tmp_path / file)
            index |= dict.fromkeys(names[part::shards], file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    back = read_weights(to_mindformers(f"{tmp_path}/", tmp_path / "out/ours.ckpt"))
    assert_same(hf_names(back), {name: tensor.float().numpy() for name, tensor in theirs.items()})


@pytest.mark.parity
def test_transformers_loads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("torch_dtype", "model_type")})
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf", max_shard_size="2KB")
    ours = to_mindformers(tmp_path / "hf", tmp_path / "ours.safetensors", qkv_concat=True)
    theirs = to_hugging_face(ours, tmp_path / "back", max_shard_size=2000)
    again, info = transformers.LlamaForCausalLM.from_pretrained(theirs, output_loading_info=True)
    assert not any(info.values())
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_float16_overflow_is_refused_by_name(tmp_path):
    weights = llama()
    weights["lm_head.weight"][0, 0] = 65519.0
    write(tmp_path / "a.ckpt", weights)
    to_mindformers(tmp_path / "a.ckpt", tmp_path / "b.ckpt", "fp16")
    before = (tmp_path / "b.ckpt").read_bytes()
    weights["lm_head.weight"][0, 0] = -65520.0
    write(tmp_path / "a.ckpt", weights)
    with pytest.raises(UserError, match=r"lm_head\.weight.*65520.*bf16"):
        to_mindformers(tmp_path / "a.ckpt", tmp_path / "b.ckpt", "fp16")
    assert (tmp_path / "b.ckpt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "b.ckpt", "b.ckpt.manifest.json"]


def test_optimizer_state_is_left_out_and_foreign_names_refused(tmp_path, capsys):
    weights = llama()
    state = {f"adam_m.{name}": array for name, array in weights.items()} | {"global_step": np.array(5)}
    write(tmp_path / "a.safetensors", weights | state)
    assert_same(read_weights(to_mindformers(tmp_path / "a.safetensors", tmp_path / "b.safetensors")), weights)
    assert f"{len(state)} tensors of training state" in "".join(capsys.readouterr())
    write(tmp_path / "c.safetensors", {"transformer.h.0.mlp.weight": np.ones(3)})
    with pytest.raises(UserError, match="GPT-2"):
        to_mindformers(tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    write(tmp_path / "e.safetensors", weights | {"model.layers.0.attention.wq.mindpet_delta_lora_a": np.ones((2, 3))})
    with pytest.raises(UserError, match="merge it"):
        to_mindformers(tmp_path / "e.safetensors", tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_the_output_folder_must_be_new(tmp_path, hf_folder):
    with pytest.raises(UserError, match="new or empty"):
        to_hugging_face(hf_folder, hf_folder)
    (tmp_path / "empty").mkdir()
    to_hugging_face(hf_folder, tmp_path / "empty", config=hf_folder)
    assert (tmp_path / "empty/model.safetensors").exists()


def test_no_room_leaves_nothing(tmp_path, hf_folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("llm_core.checkpoint.staged.shutil.disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentFault, match=r"x.*1000 bytes free"):
        to_hugging_face(hf_folder, tmp_path / "out/x", config=hf_folder)
    with pytest.raises(EnvironmentFault, match=r"y\.ckpt.*1000 bytes free"):
        to_mindformers(hf_folder, tmp_path / "out/y.ckpt")
    assert os.listdir(tmp_path / "out") == []


def test_a_damaged_input_leaves_nothing(tmp_path, hf_folder):
    ours = to_mindformers(hf_folder, tmp_path / "ours.safetensors")
    data = bytearray(ours.read_bytes())
    data[-1] ^= 1
    ours.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        to_hugging_face(ours, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def command(*arguments):
    return subprocess.run(
        [sys.executable, "tools/convert_weight.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command(tmp_path, hf_folder):
    common = ("--model", "llama", "--input_path")
    done = command(*common, f"{hf_folder}/", "--output_path", tmp_path / "a.ckpt", "--dtype", "bf16", "--qkv_concat")
    assert done.returncode == 0, done.stderr
    assert read_heads(tmp_path / "a.ckpt")["model.layers.0.attention.w_qkv.weight"].dtype.name == "bfloat16"
    done = command(
        *common, tmp_path / "a.ckpt", "--output_path", tmp_path / "back/", "--reversed",
        "--config", hf_folder / "config.json", "--max_shard_size", "1KB",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = open_weights(tmp_path / "back")
    assert len(weights) == len(llama())
    done = command(*common, tmp_path / "absent", "--output_path", tmp_path / "b.ckpt")
    assert done.returncode == 2 and "absent" in done.stderr and "Traceback" not in done.stderr
    done = command(*common, hf_folder, "--output_path", tmp_path / "b.ckpt", "--dtypes", "bf16")
    assert done.returncode == 2 and "--dtypes" in done.stderr


def test_the_command_needs_neither_torch_nor_mindspore(tmp_path, hf_folder):
    code = (
        "import sys, runpy; sys.modules.update(torch=None, mindspore=None, safetensors=None);"
        f"sys.argv = ['x', '--model', 'llama', '--input_path', {str(hf_folder)!r}, '--output_path',"
        f" {str(tmp_path / 'a.ckpt')!r}]; runpy.run_path('tools/convert_weight.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.ckpt").exists()
