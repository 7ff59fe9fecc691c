"""Weights from every kind of place, and into a network or refused."""

import json

import mindspore as ms
import numpy as np
import pytest
from checkpoint_samples import HIDDEN, assert_same, hf_names, joined, llama, write
from mindspore import nn

from llm_core.checkpoint.hf import from_hf, to_hf
from llm_core.checkpoint.qkv import ConcatView
from llm_core.checkpoint.store import CheckpointStore
from llm_core.checkpoint.weights import compare, load_into, open_weights, read_weights
from llm_core.errors import UserError


class Net(nn.Cell):
    """Parameters of the given names and shapes; what they compute is another test's matter."""

    def __init__(self, shapes, dtype=ms.float32):
        super().__init__()
        self.all = ms.ParameterTuple(
            [ms.Parameter(ms.Tensor(np.zeros(shape, np.float32), dtype=dtype), name=name) for name, shape in shapes]
        )


def net_like(weights, dtype=ms.float32):
    return Net([(name, array.shape) for name, array in weights.items()], dtype)


def values(net):
    return {name: parameter.float().asnumpy() for name, parameter in net.parameters_dict().items()}


def test_names_go_both_ways():
    for name in llama():
        assert from_hf(to_hf(name)) == name
    assert to_hf("model.layers.11.attention.wo.bias") == "model.layers.11.self_attn.o_proj.bias"
    assert from_hf("model.layers.3.mlp.down_proj.weight") == "model.layers.3.feed_forward.w2.weight"
    assert from_hf("transformer.h.0.mlp.weight") is None and to_hf("model.layers.0.attention.w_qkv.weight") is None


def test_a_file_and_a_run_and_a_rank_folder(tmp_path):
    weights = llama()
    for suffix in (".safetensors", ".ckpt"):
        write(tmp_path / f"w{suffix}", weights)
        assert_same(read_weights(tmp_path / f"w{suffix}"), weights)
    store = CheckpointStore(tmp_path / "run", "llama")
    store.save(1, 1, llama(1))
    store.save(1, 10, weights)
    for path in (tmp_path / "run", tmp_path / "run/checkpoint", store.folder, f"{store.folder}/"):
        assert_same(read_weights(path), weights)
    (store.folder / "meta.json").unlink()
    assert_same(read_weights(tmp_path / "run"), weights)  # the highest step, not the last by spelling


def test_a_folder_of_files_is_merged(tmp_path):
    base, lora = llama(), {"model.layers.0.attention.wq.mindpet_delta_lora_a": np.ones((2, HIDDEN), np.float32)}
    write(tmp_path / "base.ckpt", base)
    write(tmp_path / "lora.safetensors", lora)
    assert_same(read_weights(tmp_path), base | lora)
    write(tmp_path / "base2.ckpt", {"lm_head.weight": base["lm_head.weight"]})
    with pytest.raises(UserError, match=r"lm_head\.weight is in .*base\.ckpt and in .*base2\.ckpt"):
        read_weights(tmp_path)


def test_a_hugging_face_folder_whole_and_sharded(tmp_path):
    weights = llama()
    theirs = hf_names(weights) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    whole.mkdir(), sharded.mkdir()
    write(whole / "model.safetensors", theirs)
    assert_same(read_weights(whole), weights)
    assert_same(read_weights(whole / "model.safetensors"), weights)
    names, index = list(theirs), {}
    for part in range(3):
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        write(sharded / file, {name: theirs[name] for name in names[part::3]})
        index |= dict.fromkeys(names[part::3], file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    write(sharded / "unrelated.safetensors", {"lm_head.weight": np.zeros(3, np.float32)})
    assert_same(read_weights(sharded), weights)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003"):
        read_weights(sharded)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    write(tmp_path / "outside.safetensors", llama())
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../outside.safetensors"}}')
    with pytest.raises(UserError, match="outside"):
        read_weights(folder)


@pytest.mark.parametrize(("name", "says"), [("absent", "no such file"), ("", "no weights"), ("a.txt", "not a weight")])
def test_nothing_to_load(tmp_path, name, says):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=says):
        read_weights(tmp_path / name)


def test_values_are_read_when_asked_for(tmp_path):
    write(tmp_path / "a.safetensors", llama())
    weights = open_weights(tmp_path / "a.safetensors")
    report = compare(weights, {name: array.shape for name, array in llama().items()})
    assert len(report.matched) == len(llama())
    weights.close()
    with pytest.raises(ValueError, match="closed"):
        weights["lm_head.weight"]


def test_load_into_sets_every_parameter():
    weights = llama()
    net = net_like(weights)
    state = {"adam_m.lm_head.weight": weights["lm_head.weight"], "global_step": np.array(3)}
    report = load_into(net, weights | state | {"other": np.ones(2)})
    assert_same(values(net), weights)
    assert sorted(report.matched) == sorted(weights)
    assert (report.missing, report.unexpected, report.shape_mismatch) == ([], ["other"], [])
    assert "1 unexpected" in report.line() and "other" in report.line()


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_values_are_cast_to_the_parameters_type(dtype):
    weights = llama()
    net = net_like(weights, dtype)
    load_into(net, weights)
    for name, parameter in net.parameters_dict().items():
        assert parameter.dtype == dtype
        expected = ms.Tensor(weights[name]).astype(dtype).float().asnumpy()
        np.testing.assert_array_equal(parameter.float().asnumpy(), expected)


def test_joined_and_split_projections():
    weights = llama()
    for net, given in ((net_like(joined(weights)), weights), (net_like(weights), joined(weights))):
        load_into(net, given)
        assert_same(values(net), joined(weights) if given is weights else weights)
    net = net_like(joined(weights))
    load_into(net, joined(weights))
    assert_same(values(net), joined(weights))
    assert_same(dict(ConcatView(joined(weights), weights)), weights)


def test_a_missing_parameter():
    weights = llama()
    net = net_like(weights)
    partial = {name: array for name, array in weights.items() if "layers.1." not in name}
    with pytest.raises(UserError, match=r"w\.ckpt: 9 of .* parameters are not in it: model\.layers\.1\."):
        load_into(net, partial, source="w.ckpt")
    assert not any(array.any() for array in values(net).values())
    report = load_into(net, partial, strict=False)
    assert len(report.missing) == 9 and len(report.matched) == len(partial)


def test_adapters_may_be_missing_from_a_base_checkpoint():
    weights = llama()
    adapter = {"model.layers.0.attention.wq.mindpet_delta_lora_a": np.ones((2, HIDDEN), np.float32)}
    report = load_into(net_like(weights | adapter), weights)
    assert report.missing == list(adapter)


def test_other_shapes():
    weights = llama()
    net = net_like(weights)
    for name in ("lm_head.weight", "model.norm_out.weight"):
        weights[name] = np.ones((5, 3), np.float32)
    says = r"w: 2 of .*lm_head\.weight is \[5, 3\] in the file and \[16, 8\] in the model"
    with pytest.raises(UserError, match=says):
        load_into(net, weights, source="w", strict=False)


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (hf_names(llama()), "Hugging Face's Llama names"),
        ({"transformer.h.0.mlp.dense.weight": np.ones(2)}, "Falcon"),
        ({"layers.0.attention.wq.weight": np.ones(2)}, "Meta"),
        ({"encoder": np.ones(2)}, "model.arch"),
    ],
)
def test_no_name_matches(theirs, says):
    for strict in (True, False):
        with pytest.raises(UserError, match=f"none of its {len(theirs)} names.*{says}"):
            load_into(net_like(llama()), theirs, strict=strict)


def test_tied_heads():
    tied, untied = llama(tied=True), llama()
    as_embedding = tied | {"lm_head.weight": tied["model.tok_embeddings.embedding_weight"]}
    assert load_into(net_like(tied), as_embedding).unexpected == []
    assert load_into(net_like(tied), untied).unexpected == ["lm_head.weight"]
    with pytest.raises(UserError, match="tie_word_embeddings True"):
        load_into(net_like(untied), tied)
