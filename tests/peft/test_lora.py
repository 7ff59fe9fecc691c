"""LoRA as facts and as a layer: what is targeted, what is counted, what is learnt, and what it computes."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_core.config.model_section import LoraConfig
from llm_core.errors import UserError
from llm_core.models.spec import DecoderSpec
from llm_core.peft.apply import adapter_shapes, build_net, describe_parameters, is_trainable, parameter_counts
from llm_core.peft.lora import LORA_A, LORA_B, scaling, targets

SPEC = DecoderSpec(
    vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40, max_position=64
)
SHALLOW = replace(SPEC, num_layers=1)  # for what is compiled
INTERNLM_7B = DecoderSpec(
    vocab_size=103168, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, ffn_size=11008,
    max_position=2048, qkv_bias=True, output_bias=True,
)  # fmt: skip
EVERY = ".*"


def lora(**values) -> LoraConfig:
    return LoraConfig(**{"pet_type": "lora", "lora_dropout": 0.0, **values})


def leaves(spec: DecoderSpec, pet: LoraConfig) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in targets(spec, pet)))


def values(net) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy().copy() for name, parameter in net.parameters_dict().items()}


# ---- facts


def test_internlm_7b_has_the_known_figures_and_allocates_nothing():
    pet = lora(lora_rank=8, target_modules=".*wq|.*wk|.*wv|.*wo")
    trainable, base, adapter = parameter_counts(INTERNLM_7B, pet)
    assert trainable == adapter == 8_388_608
    assert f"{trainable / base:.4%}" == "0.1146%"
    assert "8,388,608 trainable (0.1146% of the base model's 7,321,948,160" in describe_parameters(INTERNLM_7B, pet)


def test_the_facts_need_no_mindspore():
    script = (
        "import sys; sys.path.insert(0, 'tests/peft'); import test_lora as t; "
        "assert len(t.adapter_shapes(t.INTERNLM_7B, t.lora())) == 256; assert 'mindspore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_scaling():
    assert scaling(lora(lora_rank=16, lora_alpha=8)) == 0.5
    assert scaling(lora(lora_rank=16, lora_alpha=8, use_rslora=True)) == 2.0


@pytest.mark.parametrize(
    ("pattern", "spec", "expected"),
    [
        (".*wq|.*wv", {}, ["wq", "wv"]),
        ("wq|wv", {}, ["wq", "wv"]),
        ("w", {}, ["wq", "wk", "wv", "wo", "w1", "w3", "w2"]),  # matched from the beginning, not to the end
        ("w[123]|lm_head", {}, ["w1", "w3", "w2", "lm_head"]),
        (".*_qkv|.*_gate_hidden", {"qkv_concat": True}, ["w_qkv", "w_gate_hidden"]),
        (EVERY, {"mlp": "gelu", "tied_head": True}, ["wq", "wk", "wv", "wo", "w1", "w2"]),
        (EVERY, {"head": "sequence"}, ["wq", "wk", "wv", "wo", "w1", "w3", "w2"]),  # its head is trained whole
    ],
)
def test_targets_are_matched_on_leaf_names(pattern, spec, expected):
    assert sorted(leaves(replace(SPEC, **spec), lora(target_modules=pattern))) == sorted(expected)


def test_layers_can_be_excluded():
    pet = lora(target_modules="wq|wo", exclude_layers=r"model\.layers\.0|.*wo")
    assert list(targets(SPEC, pet)) == ["model.layers.1.attention.wq"]


@pytest.mark.parametrize(
    ("pet", "says"),
    [
        ({"target_modules": "query|value"}, r"'query\|value' matches no linear layer .* wq, wk, .*, lm_head"),
        ({"target_modules": "model.*"}, "matches no linear layer"),  # leaf names, not whole ones
        ({"target_modules": "("}, r"target_modules: '\(' is no regular expression"),
        ({"exclude_layers": "model"}, "exclude_layers: 'model' leaves none of the 8 layers"),
    ],
)
def test_targets_that_are_none(pet, says):
    with pytest.raises(UserError, match=says):
        adapter_shapes(SPEC, lora(**pet))


def test_two_zeros_cannot_learn():
    with pytest.raises(ValueError, match="neither gets a gradient"):
        lora(lora_a_init="zero", lora_b_init="zeros")


def test_what_is_trained():
    def trained(**pet) -> set[str]:
        shapes = {**adapter_shapes(SPEC, lora(target_modules="wq", **pet)), "model.norm_out.weight": (32,)}
        return {name for name in shapes if is_trainable(name, SPEC, lora(target_modules="wq", **pet))}

    every = set(adapter_shapes(SPEC, lora(target_modules="wq")))
    assert trained() == every
    assert trained(freeze_exclude=["*norm*"]) == every | {"model.norm_out.weight"}
    assert trained(freeze_include=["*layers.0.*"]) == {name for name in every if "layers.1" in name}
    assert is_trainable("score.weight", replace(SPEC, head="sequence"), lora())
    assert not is_trainable("lm_head.weight", SPEC, lora())


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({"head": "sequence", "num_labels": 2}, r"of another shape: score\.weight is \[3, 32\], here \[2, 32\]"),
        ({"head": "sequence", "num_labels": 3}, r"1 that this model lacks: score\.bias"),
    ],
)
def test_a_head_of_another_shape_or_kind_does_not_fit(tmp_path, head, says):
    from llm_core.peft.adapters import read_adapter
    from llm_core.peft.hf_adapter import write_our_file

    pet, trained = lora(target_modules="wq"), replace(SPEC, head="token", num_labels=3)
    shapes = adapter_shapes(trained, pet) | {"score.weight": (3, 32), "score.bias": (3,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    path = write_our_file(tmp_path / "adapter.safetensors", pet, tensors, "")
    assert set(read_adapter(path, trained).tensors) == set(shapes)
    with pytest.raises(UserError, match=f"adapter.safetensors: does not fit .*{says}"):
        read_adapter(path, replace(SPEC, **head))


def test_what_was_trained_beside_an_adapter_is_never_left_out(tmp_path):
    """Its own pet_config says what that is; of another one that leaves some of it out, nothing is guessed."""
    from safetensors.numpy import save_file

    from llm_core.peft.adapters import read_adapter
    from llm_core.peft.hf_adapter import write_our_file

    pet, norm = lora(target_modules="wq", freeze_exclude=["*norm_out*"]), "model.norm_out.weight"
    shapes = adapter_shapes(SPEC, pet) | {norm: (32,)}
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    path = write_our_file(tmp_path / "adapter.safetensors", pet, tensors, "")
    assert read_adapter(path, SPEC).tensors.keys() == shapes.keys()
    assert read_adapter(path, SPEC, pet).tensors.keys() == shapes.keys()
    less = lora(target_modules="wq")
    says = rf"adapter.safetensors: it holds {norm}, .*freeze_exclude: \['{norm}'\]"
    with pytest.raises(UserError, match=f"{says}.*or leave pet_config out"):
        read_adapter(path, SPEC, less)
    save_file(tensors, tmp_path / "silent.safetensors")  # as MindFormers', which say nothing of how they were made
    with pytest.raises(UserError, match=says.replace("adapter", "silent")):
        read_adapter(tmp_path / "silent.safetensors", SPEC, less)
    assert read_adapter(tmp_path / "silent.safetensors", SPEC, pet).tensors.keys() == shapes.keys()
    base = {name: p.asnumpy() for name, p in build_net(SPEC, None, seed=1).parameters_dict().items()}
    save_file(base | tensors, tmp_path / "both.safetensors")  # beside a base the rest is the base's
    assert read_adapter(tmp_path / "both.safetensors", SPEC, less).tensors.keys() == adapter_shapes(SPEC, less).keys()
    save_file(tensors | {"odd.weight": base[norm]}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="1 that this model lacks: odd.weight"):
        read_adapter(tmp_path / "odd.safetensors", SPEC, pet)


def test_a_head_that_was_trained_is_not_frozen_away(tmp_path):
    from llm_core.peft.adapters import read_adapter
    from llm_core.peft.hf_adapter import write_our_file

    spec = replace(SPEC, head="sequence", num_labels=2)
    shapes = adapter_shapes(spec, lora()) | {"score.weight": (2, 32)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    path = write_our_file(tmp_path / "adapter.safetensors", lora(), tensors, "")
    with pytest.raises(UserError, match="it holds score.weight, .*freeze_exclude"):
        read_adapter(path, spec, lora(freeze_include=["score*"]))


def test_a_fresh_head_that_is_frozen_is_refused(tmp_path):
    """It would stay as it was drawn, and no checkpoint would hold it."""
    from safetensors.numpy import save_file

    from llm_core.peft.adapters import load_base

    spec, pet = replace(SPEC, head="sequence", num_labels=2), lora(freeze_include=["score*", "*norm*"])
    base = {name: p.asnumpy() for name, p in build_net(SPEC, None, seed=1).parameters_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    net = build_net(spec, pet, seed=None)
    with pytest.raises(UserError, match=r"base.safetensors: it holds no score.weight, .*freeze_include \['score\*', "):
        load_base(net, str(tmp_path / "base.safetensors"))
    assert load_base(build_net(spec, lora(), seed=None), str(tmp_path / "base.safetensors")).fresh_head
    save_file(base | {"score.weight": np.ones((2, 32), np.float32)}, tmp_path / "classifier.safetensors")
    assert not load_base(net, str(tmp_path / "classifier.safetensors")).missing


# ---- the network


@pytest.mark.parametrize("pet", [{}, {"use_dora": True}, {"target_modules": EVERY, "lora_rank": 3}])
@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, qkv_concat=True, qkv_bias=True)])
def test_names_and_shapes_are_the_networks(spec, pet):
    pet = lora(**({"target_modules": "w_qkv|wo"} if spec.qkv_concat else {}) | pet)
    net = build_net(spec, pet, seed=1)
    added = {p.name: tuple(p.shape) for p in net.get_parameters() if "mindpet_delta" in p.name}
    assert added == adapter_shapes(spec, pet)
    assert {p.name for p in net.trainable_params()} == set(added)


def test_initial_values():
    pet = lora(lora_rank=16, target_modules="wq|w2", lora_b_init="normal")
    first = values(build_net(SPEC, pet, seed=1, adapter_seed=5))
    a, b = (first[f"model.layers.1.feed_forward.w2.{name}"] for name in (LORA_A, LORA_B))
    assert abs(a).max() <= 40**-0.5 < abs(a).max() * 1.01  # uniform up to its bound
    assert a.std() == pytest.approx(40**-0.5 / 3**0.5, rel=0.1)
    assert b.std() == pytest.approx(0.01, rel=0.15)
    alone = values(build_net(SPEC, lora(lora_rank=16, target_modules="w2"), seed=None, adapter_seed=5))
    np.testing.assert_array_equal(alone[f"model.layers.1.feed_forward.w2.{LORA_A}"], a)  # whatever else there is
    assert not alone[f"model.layers.1.feed_forward.w2.{LORA_B}"].any()
    other = values(build_net(SPEC, pet, seed=1, adapter_seed=6))
    assert not np.array_equal(other[f"model.layers.1.feed_forward.w2.{LORA_A}"], a)
    same = "model.layers.1.feed_forward.w2.weight"
    np.testing.assert_array_equal(other[same], first[same])


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(dora):
    from mindspore import Tensor

    tokens = Tensor(np.arange(12, dtype=np.int32).reshape(2, 6))
    base = build_net(SHALLOW, None, seed=4)(tokens).asnumpy()
    adapted = build_net(SHALLOW, lora(target_modules=EVERY, use_dora=dora), seed=4)(tokens).asnumpy()
    np.testing.assert_allclose(adapted, base, rtol=0, atol=1e-6 * abs(base).max() if dora else 0)


def test_dropout_acts_in_training_alone_and_follows_its_key():
    from mindspore import Tensor

    from llm_core.models.heads import TokenLoss
    from llm_core.ops import dropout_key

    pet = lora(target_modules=EVERY, lora_dropout=0.5, lora_b_init="he_uniform")
    loss = TokenLoss(build_net(SHALLOW, pet, seed=4)).set_train()
    tokens = np.random.default_rng(0).integers(1, 48, (2, 7)).astype(np.int32)
    batch = Tensor(tokens[:, :-1].copy()), Tensor(tokens[:, 1:].copy())

    def of(*key):
        return float(loss(*batch, *(Tensor(dropout_key(*each)) for each in key))[0].asnumpy())

    plain = of()
    assert plain == of()
    assert of((1, 5)) == of((1, 5)) != of((1, 6)) != plain
    without = TokenLoss(build_net(SHALLOW, lora(**{**pet.model_dump(), "lora_dropout": 0.0}), seed=4)).set_train()
    assert float(without(*batch)[0].asnumpy()) == pytest.approx(plain, rel=1e-6)


def test_bfloat16_products():
    from mindspore import Tensor

    from llm_core import ops as core_ops

    if core_ops.backend().operators.bf16_refusal():
        pytest.skip(core_ops.backend().operators.bf16_refusal())
    pet = lora(target_modules=EVERY, lora_b_init="he_uniform")
    tokens = Tensor(np.arange(12, dtype=np.int32).reshape(2, 6))
    exact = build_net(SHALLOW, pet, seed=4)(tokens).asnumpy()
    rounded = build_net(replace(SHALLOW, compute_dtype="bfloat16"), pet, seed=4)(tokens).asnumpy()
    assert 0 < np.linalg.norm(rounded - exact) < 0.02 * np.linalg.norm(exact)


# ---- the graph

STEP = """
import os, sys
os.environ["RUN_LLM_COMPILE_CACHE"] = "0"
sys.path[:0] = [".", "tests/peft"]
from llm_core.runtime import prepare_environment
prepare_environment()
import mindspore as ms
import numpy as np
from mindspore import Tensor
import test_lora as t
from llm_core import ops
from llm_core.models.heads import training_loss
from llm_core.train.step import AccumulateStep

ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", save_graphs=1, save_graphs_path=sys.argv[1])
net = t.build_net(t.SHALLOW, t.lora(target_modules="wq"), seed=1)
weights = ms.ParameterTuple(net.trainable_params())
sums = ms.ParameterTuple(ms.Parameter(w.value(), name="sum." + w.name) for w in weights)
step = AccumulateStep(training_loss(net), weights, sums).set_train()
tokens, one = Tensor(np.ones((2, 8), np.int32)), Tensor(np.float32(1))
step.compile(tokens, tokens, Tensor(ops.dropout_key(0, 1)), one, one)
print(ops.backend().name)
"""


def test_the_graph_computes_no_gradient_of_a_frozen_weight(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(tmp_path)], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.stdout.split()[-1] != "cpu":
        pytest.skip("counts the operators of the CPU kernels")
    graph = max(tmp_path.glob("trace_code_graph_*")).read_text()
    forward, update = 7, 2  # of the layer's linears; of A and B
    # Behind wq nothing learns, so its input needs no gradient, nor do wk and wv.
    inputs, factors = 4, 3  # gradients to the inputs of wo, w1, w3, w2; to A, B and what lies between them
    assert len(re.findall(r"= \w*MatMul\(", graph)) == forward + update + inputs + factors
    assert "linear_cross_entropy_frozen" in graph and "attention_backward" in graph
    assert "embedding_backward" not in graph
