"""Base and adapter as evaluation and prediction have them: one network, that computes what the two did apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from adapter_models import EVERY, TOKENS, base_weights, our_logits, pet_config, random_adapter, spec_of
from mindspore import Tensor
from safetensors.numpy import save_file

from llm_core.config.model_section import PTuning2Config
from llm_core.errors import UserError
from llm_core.models.layers import Linear
from llm_core.peft.adapters import Adapter, base_fingerprint, load_base
from llm_core.peft.apply import build_net
from llm_core.peft.inference import is_merged, net_with_adapter


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)


def adapter_of(tmp_path, spec, **fields) -> Adapter:
    pet = pet_config(**fields)
    return Adapter(tmp_path / "adapter", pet, random_adapter(spec, pet))


def base_of(tmp_path, spec) -> str:
    save_file(base_weights(spec), tmp_path / "base.safetensors")
    return str(tmp_path / "base.safetensors")


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        ("gqa", {}, {"use_rslora": True}),
        ("biases", {}, {"target_modules": EVERY + "|lm_head", "use_dora": True}),
        ("gqa", {"qkv_concat": True}, {"target_modules": "w_qkv|w_gate_hidden|w2"}),
        ("falcon_40b", {}, {"target_modules": "wq|w1"}),
    ],
)
def test_a_merged_network_is_plain_and_computes_the_same(tmp_path, name, changes, fields):
    spec = replace(spec_of(name), **changes)
    adapter = adapter_of(tmp_path, spec, **fields)
    net, report = net_with_adapter(spec, base_of(tmp_path, spec), adapter)
    assert not report.missing and net.parameters_dict().keys() == base_weights(spec).keys()
    assert type(net.model.layers[0].attention.wo) is Linear  # what the one-token layer asks for
    before = our_logits(spec, adapter.pet, adapter.tensors)
    after = net.set_train(False)(Tensor(TOKENS)).asnumpy()
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)
    base = our_logits(spec, None, {})
    assert np.linalg.norm(base - before) > 1e-2 * np.linalg.norm(before)


def test_what_was_trained_beside_the_adapter_is_there(tmp_path):
    """A norm, a matrix that has factors as well, and a classifier's head."""
    spec = replace(spec_of("gqa"), head="sequence", num_labels=3)
    norm, both = "model.norm_out.weight", "model.layers.0.attention.wv.weight"
    adapter = adapter_of(tmp_path, spec, freeze_exclude=["*norm_out*", both])
    shapes = {norm: (32,), both: base_weights(spec)[both].shape, "score.weight": (3, 32)}
    random = np.random.RandomState(7)
    beside = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    adapter = replace(adapter, tensors=adapter.tensors | beside)
    base = {name: array for name, array in base_weights(spec).items() if name != "score.weight"}
    save_file(base, tmp_path / "base.safetensors")
    net, report = net_with_adapter(spec, str(tmp_path / "base.safetensors"), adapter)
    assert not report.missing
    np.testing.assert_array_equal(net.score.weight.asnumpy(), beside["score.weight"])
    np.testing.assert_array_equal(net.model.norm_out.weight.asnumpy(), beside[norm])
    a, b = (adapter.tensors[both.replace("weight", f"mindpet_delta_lora_{factor}")] for factor in "ab")
    expected = beside[both] + np.float32(7 / 3) * b @ a
    np.testing.assert_allclose(net.model.layers[0].attention.wv.weight.asnumpy(), expected, atol=1e-5)


def test_another_base_is_refused_before_a_value_is_set(tmp_path):
    spec = spec_of("gqa")
    adapter, base = adapter_of(tmp_path, spec), base_of(tmp_path, spec)
    net = build_net(spec, adapter.pet, seed=None)
    load_base(net, base)
    known = replace(adapter, base="the/base", base_fingerprint=base_fingerprint(net))
    net_with_adapter(spec, base, known)
    other = base_weights(spec)
    other["model.norm_out.weight"] += np.float32(0.5)
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"trained on another base, the/base, .*1 tensors differ: model\.norm_out"):
        net_with_adapter(spec, str(tmp_path / "other.safetensors"), known)


def test_what_is_not_merged(tmp_path):
    """bfloat16 products are rounded apart; a prefix has no weights of the base's shape."""
    spec = spec_of("gqa")
    assert is_merged(spec, pet_config()) and not is_merged(spec, None)
    assert not is_merged(replace(spec, compute_dtype="bfloat16"), pet_config())
    assert not is_merged(spec, pet_config(compute_dtype="bfloat16"))
    assert not is_merged(spec, PTuning2Config(pet_type="ptuning2", pre_seq_len=2))
    adapter, base = adapter_of(tmp_path, spec, compute_dtype="bfloat16"), base_of(tmp_path, spec)
    net, _ = net_with_adapter(spec, base, adapter)
    assert adapter.tensors.keys() < net.parameters_dict().keys()
    assert net_with_adapter(spec, base, None)[0].parameters_dict().keys() == base_weights(spec).keys()


def test_a_head_that_no_file_has_and_the_adapter_freezes(tmp_path):
    spec = replace(spec_of("gqa"), head="sequence", num_labels=3)
    base = {name: array for name, array in base_weights(spec).items() if name != "score.weight"}
    save_file(base, tmp_path / "base.safetensors")
    adapter = adapter_of(tmp_path, spec, freeze_include=["score*"])
    with pytest.raises(UserError, match=r"it holds no score.weight, .*freeze_include \['score\*'\]"):
        net_with_adapter(spec, str(tmp_path / "base.safetensors"), adapter)
