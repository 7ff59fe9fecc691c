"""Merging LoRA: the merged model computes what base and adapter did; what would be another model is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_models import EVERY, base_weights, our_logits, pet_config, random_adapter, spec_of

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.files import read_heads, write_tensors
from llm_core.checkpoint.manifest import verified_version
from llm_core.checkpoint.qkv import ConcatView
from llm_core.checkpoint.staged import StagedFile
from llm_core.checkpoint.weights import open_weights, read_weights
from llm_core.errors import UserError
from llm_core.peft.adapters import Adapter, read_adapter
from llm_core.peft.hf_adapter import write_adapter, write_our_file
from llm_core.peft.merge import merge_files, merge_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)


def write(path: Path, tensors: dict[str, np.ndarray], dtype: str | None = None) -> Path:
    """A weight file; dtype: bfloat16 or None, as they are."""
    from llm_core.checkpoint.dtypes import BY_NAME

    heads = {name: head_of(array) for name, array in tensors.items()}
    if dtype is not None:
        heads = {name: replace(head, dtype=BY_NAME[dtype]) for name, head in heads.items()}
    with StagedFile(path, 0) as staged:
        write_tensors(staged, heads, tensors.__getitem__, {})
        staged.commit()
    return path


def made(spec, **fields) -> Adapter:
    pet = pet_config(**fields)
    return Adapter(Path("an/adapter"), pet, random_adapter(spec, pet))


# ---- logits

CASES = [
    ("gqa", {}, {}),
    ("tied", {}, {"target_modules": EVERY, "use_rslora": True}),
    ("biases", {}, {"target_modules": EVERY + "|lm_head", "use_dora": True}),
    ("gqa", {"qkv_concat": True}, {"target_modules": "w_qkv|w_gate_hidden|w2", "use_dora": True}),
    ("falcon_rw", {}, {"target_modules": EVERY}),
    ("falcon_40b", {}, {"target_modules": "wq|w1", "lora_rank": 16}),
]


@pytest.mark.parametrize("name, changes, fields", CASES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)])
def test_merged_logits_are_the_unmerged(name, changes, fields):
    spec = replace(spec_of(name), **changes)
    adapter = made(spec, **fields)
    base = base_weights(spec)
    merged = dict(merge_lora(base, adapter.tensors, adapter.pet))
    assert merged.keys() == base.keys()
    before, after = our_logits(spec, adapter.pet, adapter.tensors), our_logits(spec, None, merged)
    assert np.linalg.norm(after - before) < 5e-6 * np.linalg.norm(before)
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


def test_the_scaling_is_the_configurations():
    """Not 1, which MindFormers' tool takes when it is not told."""
    spec = spec_of("linear")
    adapter, base = made(spec, lora_rank=2, lora_alpha=6), base_weights(spec)
    name = "model.layers.0.attention.wv"
    a, b = (adapter.tensors[f"{name}.mindpet_delta_lora_{x}"].astype(np.float64) for x in "ab")
    merged = merge_lora(base, adapter.tensors, adapter.pet)
    np.testing.assert_allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 3 * b @ a, rtol=1e-5, atol=1e-7)
    rslora = merge_lora(base, adapter.tensors, adapter.pet.model_copy(update={"use_rslora": True}))
    expected = base[f"{name}.weight"] + 6 / 2**0.5 * b @ a
    np.testing.assert_allclose(rslora[f"{name}.weight"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stored_joined", [True, False])
def test_projections_of_the_base_may_be_joined_or_split(stored_joined):
    """The adapter decides how they are merged, the base how they are written."""
    split = spec_of("gqa")
    joined = replace(split, qkv_concat=True)
    stored, trained = (joined, split) if stored_joined else (split, joined)
    adapter = made(trained, target_modules="w_qkv|w1" if trained.qkv_concat else "wq|wv|w1")
    merged = dict(merge_lora(base_weights(stored), adapter.tensors, adapter.pet))
    assert merged.keys() == base_weights(stored).keys()
    same = dict(merge_lora(base_weights(trained), adapter.tensors, adapter.pet))
    for name, array in ConcatView(same, merged).items():
        np.testing.assert_array_equal(merged[name], array, err_msg=name)


def test_a_norm_that_was_trained_as_well_takes_the_bases_place():
    spec, norm = spec_of("linear"), "model.norm_out.weight"
    adapter = made(spec)
    tensors = adapter.tensors | {norm: np.full(32, 3, np.float32)}
    assert (merge_lora(base_weights(spec), tensors, adapter.pet)[norm] == 3).all()
    tensors[norm] = np.full(8, 3, np.float32)
    with pytest.raises(UserError, match=r"for another model: model.norm_out.weight is \[8\] in it and \[32\]"):
        merge_lora(base_weights(spec), tensors, adapter.pet)


def test_a_weight_that_was_trained_beside_its_update_keeps_both(tmp_path):
    """As freeze_exclude has it: W of the adapter, and its own factors on top."""
    spec, name = spec_of("linear"), "model.layers.0.attention.wv"
    adapter = made(spec, freeze_exclude=["*attention.wv.weight"])
    trained = 1.5 * base_weights(spec)[f"{name}.weight"]
    adapter = replace(adapter, tensors=adapter.tensors | {f"{name}.weight": trained})
    a, b = (adapter.tensors[f"{name}.mindpet_delta_lora_{x}"] for x in "ab")
    merged = merge_lora(base_weights(spec), adapter.tensors, adapter.pet)[f"{name}.weight"]
    np.testing.assert_allclose(merged, trained + 7 / 3 * b @ a, rtol=1e-5, atol=1e-6)
    base = write(tmp_path / "base.safetensors", base_weights(spec))
    assert merge_files(spec, base, adapter, tmp_path / "merged.safetensors").drift < 5e-6


def test_a_classifiers_head_comes_along(tmp_path):
    spec = replace(spec_of("linear"), head="sequence", num_labels=3)
    adapter = made(spec)
    score = np.random.RandomState(0).standard_normal((3, 32)).astype(np.float32)
    adapter = replace(adapter, tensors=adapter.tensors | {"score.weight": score})
    weights = base_weights(spec)
    del weights["score.weight"]  # no base model has one
    base = write(tmp_path / "base.safetensors", weights)
    merge = merge_files(spec, base, adapter, tmp_path / "merged.safetensors")
    assert merge.drift < 5e-6
    np.testing.assert_array_equal(read_weights(merge.path)["score.weight"], score)


# ---- refused


def test_what_would_be_another_model_is_refused():
    spec = spec_of("linear")
    adapter, base = made(spec), base_weights(spec)
    with pytest.raises(UserError, match=r"another rank: .*wk has rank 3, and pet_config says lora_rank 8"):
        merge_lora(base, adapter.tensors, pet_config(lora_rank=8))
    with pytest.raises(UserError, match=r"for .*wk.weight it is \[16, 32\], and the base's is \[24, 32\]"):
        merge_lora(base_weights(replace(spec, head_dim=12)), adapter.tensors, adapter.pet)
    deep = made(spec_of("gqa"))
    with pytest.raises(UserError, match=r"the base has no model.layers.1.attention.wk.weight"):
        merge_lora(base, deep.tensors, deep.pet)
    name = "model.layers.0.attention.wq.mindpet_delta_lora_b"
    with pytest.raises(UserError, match=f"lacks {name}, which is needed"):
        merge_lora(base, {n: a for n, a in adapter.tensors.items() if n != name}, adapter.pet)
    with pytest.raises(UserError, match=r"holds mindpet_delta_prefixtuning_embedding.*, which has no use"):
        odd = {"mindpet_delta_prefixtuning_embedding.embedding_table": np.zeros((2, 2), np.float32)}
        merge_lora(base, adapter.tensors | odd, adapter.pet)
    with pytest.raises(UserError, match=r"1 tensors of an adapter, which would stay unmerged: .*lora_a"):
        left = {"model.layers.0.attention.wo.mindpet_delta_lora_a": np.zeros((3, 32), np.float32)}
        merge_lora(base | left, adapter.tensors, adapter.pet)
    from llm_core.config.model_section import PrefixTuningConfig

    with pytest.raises(UserError, match="only LoRA can be merged, and this is prefixtuning"):
        merge_lora(base, adapter.tensors, PrefixTuningConfig(pet_type="prefixtuning"))


# ---- files


@pytest.fixture
def files(tmp_path):
    """A base's file and an adapter for it, of the case `gqa`."""
    spec = spec_of("gqa")
    base = write(tmp_path / "base.safetensors", base_weights(spec))
    return spec, base, replace(made(spec), source=tmp_path / "adapter.safetensors")


def test_a_merged_file_is_whole_and_has_a_manifest(files, tmp_path):
    spec, base, adapter = files
    merge = merge_files(spec, base, adapter, tmp_path / "merged.safetensors")
    assert merge.layers == 8 and merge.scaling == pytest.approx(7 / 3) and merge.rounding is None
    assert 0 < merge.drift < 1e-6 and "8 layers merged with scaling 2.33333; logits moved by" in merge.line()
    assert verified_version(merge.path) is not None
    expected = dict(merge_lora(base_weights(spec), adapter.tensors, adapter.pet))
    for name, array in read_weights(merge.path).items():
        np.testing.assert_array_equal(array, expected.pop(name))
    assert not expected


def test_half_width_is_merged_wide_and_written_narrow(files, tmp_path):
    spec, _, adapter = files
    base = write(tmp_path / "half.safetensors", base_weights(spec), "bfloat16")
    merge = merge_files(spec, base, adapter, tmp_path / "merged.ckpt", "bf16")
    assert merge.drift < 1e-6 and 1e-4 < merge.rounding < 3e-2 and "rounding to its type" in merge.line()
    assert {head.dtype.name for head in read_heads(merge.path).values()} == {"bfloat16"}
    wide = merge_files(spec, base, adapter, tmp_path / "wide.safetensors", compare=False)
    assert wide.drift is None and "not compared" in wide.line()
    name = "model.layers.1.attention.wo.weight"
    rounded = read_weights(base)[name]
    b, a = (adapter.tensors[name.replace("weight", f"mindpet_delta_lora_{x}")] for x in "ba")
    np.testing.assert_allclose(read_weights(wide.path)[name], rounded + 7 / 3 * b @ a, rtol=1e-5, atol=1e-6)


def test_logits_are_compared_in_float32(files, tmp_path):
    """Whatever types the run and its pet_config have: bfloat16 products would be another model's."""
    spec, base, adapter = files
    narrow = replace(adapter, pet=pet_config(compute_dtype="bfloat16"))
    merge = merge_files(replace(spec, compute_dtype="bfloat16"), base, narrow, tmp_path / "merged.safetensors")
    assert 0 < merge.drift < 1e-6


def test_drift_is_refused_and_nothing_written(files, tmp_path, monkeypatch):
    from llm_core.peft import merge as module

    spec, base, adapter = files
    monkeypatch.setattr(module, "scaling", lambda pet: 1.0)  # upstream's default
    with pytest.raises(UserError, match=r"adapter\.safetensors: merged into .*base\.safetensors, the logits move by"):
        merge_files(spec, base, adapter, tmp_path / "merged.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors"]


def test_a_base_with_an_adapter_of_its_own(files, tmp_path):
    """Of one file that holds both, that adapter is merged; beside another adapter it would stay unmerged."""
    spec, _, adapter = files
    both = write(tmp_path / "both.safetensors", base_weights(spec) | adapter.tensors)
    found = read_adapter(both, spec, adapter.pet)
    merge = merge_files(spec, both, found, tmp_path / "merged.safetensors")
    assert not any("mindpet" in name for name in open_weights(merge.path))
    with pytest.raises(UserError, match="the base holds an adapter of its own"):
        merge_files(spec, both, adapter, tmp_path / "again.safetensors")


@pytest.mark.parametrize("compare", [True, False])
def test_another_base_is_refused(files, tmp_path, compare):
    """Of the same shapes; an adapter of a run says which base it was trained on."""
    from llm_core.peft.adapters import base_fingerprint, load_base
    from llm_core.peft.apply import build_net

    spec, base, adapter = files
    net = build_net(spec, adapter.pet, seed=None)
    load_base(net, str(base))
    known = replace(adapter, base="the/base", base_fingerprint=base_fingerprint(net))
    assert merge_files(spec, base, known, tmp_path / "merged.safetensors", compare=compare).layers == 8
    other = base_weights(spec)
    other["model.norm_out.weight"] = other["model.norm_out.weight"] + np.float32(0.5)
    other = write(tmp_path / "other.safetensors", other)
    with pytest.raises(UserError, match="trained on another base, the/base"):
        merge_files(spec, other, known, tmp_path / "again.safetensors", compare=compare)
    assert not (tmp_path / "again.safetensors").exists()


# ---- the commands


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"tools/{script}.py", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)  # fmt: skip


CONFIG = """\
run_mode: finetune
context: {{device_target: CPU}}
load_checkpoint: {base}
model:
  arch: {{type: LlamaForCausalLM}}
  model_config:
    {{type: LlamaConfig, seq_length: 73, vocab_size: 48, hidden_size: 32, num_layers: 2, num_heads: 4, n_kv_heads: 2,
     intermediate_size: 40, compute_dtype: bfloat16,
     pet_config: {{pet_type: lora, lora_rank: 3, lora_alpha: 7, lora_dropout: 0.1, target_modules: wq|wk|wv|wo}}}}
"""


def test_tools(files, tmp_path):
    """PEFT folder -> our file -> merged, by MindFormers' flags as well; then back to a PEFT folder."""
    spec, base, adapter = files
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(base=base))
    folder = write_adapter(tmp_path / "peft", adapter.pet, adapter.tensors, spec, str(base))
    ours = tmp_path / "ours.safetensors"
    done = run("convert_adapter", "--input_path", folder, "--output_path", ours, "--config", config)
    assert done.returncode == 0, done.stderr
    assert verified_version(ours).state["adapter"]["base"] == str(base)
    for name, array in read_weights(ours).items():
        np.testing.assert_array_equal(array, adapter.tensors[name])

    done = run("merge_lora", "--adapter_id", ours, "--config", config, "--output_path", tmp_path / "merged.safetensors")
    assert done.returncode == 0, done.stderr
    assert "8 layers merged with scaling 2.33333; logits moved by" in done.stdout + done.stderr
    done = run("merge_lora", "--adapter_id", folder, "--config", config, "--output_path", tmp_path / "direct.ckpt",
               "--no_compare")  # fmt: skip
    assert done.returncode == 0, done.stderr
    direct = read_weights(tmp_path / "direct.ckpt")
    both = tmp_path / "both"
    both.mkdir()
    write(both / "model.ckpt", base_weights(spec))
    write(both / "lora.ckpt", adapter.tensors)
    done = run("merge_lora", "--src_ckpt_path_or_dir", both, "--dst_ckpt_dir", tmp_path / "dst", "--config", config,
               "--lora_scaling", 7 / 3, "--no_compare")  # fmt: skip
    assert done.returncode == 0, done.stderr
    merged = read_weights(tmp_path / "merged.safetensors")
    upstream = read_weights(tmp_path / "dst")
    assert [path.name for path in (tmp_path / "dst" / "rank_0").glob("*.ckpt")] == ["checkpoint_0.ckpt"]
    for name, array in merged.items():
        np.testing.assert_array_equal(upstream[name], array)
        np.testing.assert_array_equal(direct[name], array)

    done = run("convert_adapter", "--input_path", ours, "--output_path", tmp_path / "back", "--config", config)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert said == json.loads((folder / "adapter_config.json").read_text())


def test_the_base_is_the_one_that_the_adapter_was_trained_on(files, tmp_path):
    """Not the one that the configuration names, which a later run into the same folder may have written."""
    _, base, adapter = files
    ours = write_our_file(tmp_path / "ours.safetensors", adapter.pet, adapter.tensors, str(base))
    (tmp_path / "run.yaml").write_text(CONFIG.format(base=tmp_path / "another.safetensors"))
    merged = tmp_path / "merged.safetensors"
    done = run("merge_lora", "--adapter_id", ours, "--config", tmp_path / "run.yaml", "--output_path", merged,
               "--no_compare")  # fmt: skip
    assert done.returncode == 0, done.stderr
    nameless = write_our_file(tmp_path / "nameless.safetensors", adapter.pet, adapter.tensors, "")
    done = run("merge_lora", "--adapter_id", nameless, "--config", tmp_path / "run.yaml", "--output_path", merged,
               "--no_compare")  # fmt: skip
    assert done.returncode == 2 and "another.safetensors: no such file" in done.stderr


def test_the_adapter_is_the_one_beside_the_base(files, tmp_path):
    """As a run finds it: in a file of another name beside a model.safetensors; of two, one has to be named."""
    spec, base, adapter = files
    config, folder, merged = tmp_path / "run.yaml", tmp_path / "beside", tmp_path / "merged.safetensors"
    config.write_text(CONFIG.format(base=base))
    folder.mkdir()
    write(folder / "model.safetensors", base_weights(spec))
    arguments = ("--load_checkpoint", folder, "--config", config, "--output_path", merged, "--no_compare")
    done = run("merge_lora", *arguments)
    assert done.returncode == 2 and "there is no adapter in it" in done.stderr
    write_our_file(folder / "lora.safetensors", adapter.pet, adapter.tensors, str(base))
    done = run("merge_lora", *arguments)
    assert done.returncode == 0 and f"{folder / 'lora.safetensors'}: adapter: " in done.stdout + done.stderr
    expected = dict(merge_lora(base_weights(spec), adapter.tensors, adapter.pet))
    for name, array in read_weights(merged).items():
        np.testing.assert_array_equal(array, expected[name])
    write_our_file(folder / "other.safetensors", adapter.pet, adapter.tensors, str(base))
    done = run("merge_lora", *arguments)
    assert done.returncode == 2 and "2 adapters lie beside the base: " in done.stderr and "--adapter_id" in done.stderr


def test_tools_say_what_is_wrong(files, tmp_path):
    spec, base, adapter = files
    ours = write_our_file(tmp_path / "ours.safetensors", adapter.pet, adapter.tensors, "")
    merge = ("merge_lora", "--load_checkpoint", base, "--adapter_id", ours)
    done = run(*merge)
    assert done.returncode == 2 and "--output_path" in done.stderr
    done = run(*merge, "--output_path", tmp_path / "m.ckpt")
    assert done.returncode == 2 and "do not say what model this is" in done.stderr
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(base=base))
    done = run(*merge, "--output_path", tmp_path / "m.ckpt", "--config", config, "--lora_scaling", 1)
    assert done.returncode == 2 and "--lora_scaling 1: " in done.stderr and "trained with 2.33333" in done.stderr
    config.write_text(config.read_text().replace("lora_rank: 3", "lora_rank: 4"))
    done = run(*merge, "--output_path", tmp_path / "m.ckpt", "--config", config)
    assert done.returncode == 2 and "lora_rank is 3 there and 4 here" in done.stderr
    done = run(*merge, "--output_path", tmp_path / "m.ckpt", "--src_ckpt_strategy", "x")
    assert done.returncode == 2 and "tools/transform_ckpt.py" in " ".join(done.stderr.split())
    assert not (tmp_path / "m.ckpt").exists()
