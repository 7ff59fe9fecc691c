"""Hugging Face PEFT folders: PEFT loads ours and gives the same logits, and the other way; what differs is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from adapter_models import (
    EVERY,
    RANK,
    base_weights,
    hf_logits,
    hf_model,
    our_logits,
    pet_config,
    random_adapter,
    spec_of,
)

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.files import open_tensor_file, write_tensors
from llm_core.checkpoint.staged import StagedFile
from llm_core.errors import UserError
from llm_core.peft import lora
from llm_core.peft.hf_adapter import is_hf_adapter, read_adapter, write_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# ---- against PEFT

WRITTEN = [
    ("gqa", {"target_modules": EVERY}),
    ("mha", {"use_rslora": True, "exclude_layers": r"model\.layers\.0\.attention\.w[qk]"}),
    ("biases", {"use_dora": True, "target_modules": EVERY + "|lm_head"}),
    ("falcon_rw", {"use_rslora": True}),
    ("falcon_7b", {"target_modules": "wq|wv|w1|w2"}),
    ("falcon_40b", {"target_modules": EVERY, "use_dora": True}),
]


@pytest.mark.parity
@pytest.mark.parametrize("name, fields", WRITTEN, ids=[name for name, _ in WRITTEN])
def test_peft_loads_ours(tmp_path, name, fields):
    peft = pytest.importorskip("peft")
    spec, pet = spec_of(name), pet_config(**fields)
    adapter = random_adapter(spec, pet)
    folder = write_adapter(tmp_path / "adapter", pet, adapter, spec, "some/base")
    model = peft.PeftModel.from_pretrained(hf_model(name), folder)
    plain = hf_logits(hf_model(name))
    theirs, ours = hf_logits(model), our_logits(spec, pet, adapter)
    assert np.abs(theirs - plain).max() > 0.05  # the adapter does something
    assert np.abs(theirs - ours).max() < 1e-5
    assert model.peft_config["default"].base_model_name_or_path == "some/base"
    # every factor was loaded: none is left at PEFT's own start, which has B of zeros
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


READ = [
    ("gqa", False, {"target_modules": ["q_proj", "v_proj"]}),
    ("gqa", True, {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "use_rslora": True}),
    ("mha", False, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5, "mlp.down_proj": 2},
                    "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 20}}),
    ("mha", False, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "use_dora": True}),
    ("biases", True, {"target_modules": ["q_proj", "k_proj", "v_proj"], "use_dora": True}),
    ("falcon_rw", False, {"target_modules": ["query_key_value", "dense"]}),
    ("falcon_7b", False, {"target_modules": ["query_key_value", "dense_h_to_4h"], "use_dora": True}),
    ("falcon_40b", False, {"target_modules": ["query_key_value", "dense"], "rank_pattern": {"dense": 2}}),
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name, qkv_concat, fields", READ, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(READ)])
def test_ours_loads_peft(tmp_path, name, qkv_concat, fields):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=7, init_lora_weights=False, task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(hf_model(name), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "magnitude" in parameter_name:
                parameter *= 1 + 0.2 * torch.rand_like(parameter)
            elif "lora_" in parameter_name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert is_hf_adapter(tmp_path)
    spec = replace(spec_of(name), qkv_concat=qkv_concat)
    pet, adapter = read_adapter(tmp_path, spec)
    assert {n: a.shape for n, a in adapter.items()} == lora.shapes(spec, pet)
    theirs = hf_logits(model)
    assert np.abs(theirs - hf_logits(hf_model(name))).max() > 0.01
    assert np.abs(theirs - our_logits(spec, pet, adapter)).max() < 1e-5


@pytest.mark.parity
def test_a_classifier_keeps_its_head(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=40, num_labels=3, pad_token_id=0)  # fmt: skip
    model = peft.get_peft_model(
        LlamaForSequenceClassification(config),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "theirs")
    spec = replace(spec_of("linear"), head="sequence", num_labels=3)
    pet, adapter = read_adapter(tmp_path / "theirs", spec)
    score = dict(model.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
    np.testing.assert_array_equal(adapter["score.weight"], score.detach().numpy())
    write_adapter(tmp_path / "ours", pet, adapter, spec, "base")
    again = peft.PeftModel.from_pretrained(LlamaForSequenceClassification(config), tmp_path / "ours")
    loaded = dict(again.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
    assert torch.equal(loaded, score)
    with pytest.raises(UserError, match=r"modules_to_save: .*'score'.*this model is of the kind 'causal'"):
        read_adapter(tmp_path / "ours", spec_of("linear"))


# ---- there and back


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": EVERY}])
@pytest.mark.parametrize(
    "name, qkv_concat", [("gqa", False), ("gqa", True), ("falcon_rw", False), ("falcon_40b", False)]
)
def test_there_and_back_is_bit_equal(tmp_path, name, qkv_concat, fields):
    spec = replace(spec_of(name), qkv_concat=qkv_concat)
    pet = pet_config(**(fields | ({"target_modules": EVERY} if qkv_concat else {})))
    adapter = random_adapter(spec, pet)
    again, back = read_adapter(write_adapter(tmp_path / "a", pet, adapter, spec, "base"), spec)
    assert_same(back, adapter)
    assert lora.targets(spec, again) == lora.targets(spec, pet)
    for key in ("lora_rank", "lora_dropout", "use_rslora", "use_dora"):
        assert getattr(again, key) == getattr(pet, key)
    assert again.lora_alpha == pytest.approx(pet.lora_alpha, rel=1e-12)


def test_layers_left_out_stay_out(tmp_path):
    spec = spec_of("gqa")
    pet = pet_config(exclude_layers=r"model\.layers\.1\.")
    adapter = random_adapter(spec, pet)
    folder = write_adapter(tmp_path / "a", pet, adapter, spec, "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    again, back = read_adapter(folder, spec)
    assert_same(back, adapter)
    assert lora.targets(spec, again) == lora.targets(spec, pet)


def test_blocks_of_a_layer_that_was_trained_as_one_are_one(tmp_path):
    """What PEFT trains on our block-wise update fills its zeros: then the note in the file says too little."""
    spec, pet = spec_of("falcon_7b"), pet_config(target_modules="wq|wk|wv")
    folder = write_adapter(tmp_path / "a", pet, random_adapter(spec, pet), spec, "base")
    name = "base_model.model.transformer.h.0.self_attention.query_key_value.lora_B.weight"
    _change(folder, lambda tensors: tensors.update({name: tensors[name] + np.float32(0.1)}))
    again, back = read_adapter(folder, spec)
    assert again.lora_rank == 3 * RANK and lora.scaling(again) == pytest.approx(lora.scaling(pet))
    assert back["model.layers.0.attention.wk.mindpet_delta_lora_b"].all()


def test_internlm2s_fused_projection_is_split(tmp_path):
    """Rows of wqkv: for each of the two key/value heads its two query heads, its key head, its value head."""
    spec = replace(spec_of("gqa"), num_layers=1)
    random = np.random.RandomState(0)
    start = "base_model.model.model.layers.0.attention"
    tensors = {f"{start}.{layer}.lora_{x}.weight": random.standard_normal(shape).astype(np.float32)
               for layer, rows in (("wqkv", 64), ("wo", 32)) for x, shape in (("A", (3, 32)), ("B", (rows, 3)))}
    heads = {name: head_of(array) for name, array in tensors.items()}
    with StagedFile(tmp_path / WEIGHTS, 0) as staged:
        write_tensors(staged, heads, tensors.__getitem__, {"format": "pt"})
        staged.commit()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    pet, adapter = read_adapter(tmp_path, spec)
    assert lora.scaling(pet) == 2
    ours, fused = "model.layers.0.attention", tensors[f"{start}.wqkv.lora_B.weight"].reshape(2, 4, 8, 3)
    rows = {"wq": fused[:, :2].reshape(32, 3), "wk": fused[:, 2].reshape(16, 3), "wv": fused[:, 3].reshape(16, 3)}
    for part, expected in rows.items():
        np.testing.assert_array_equal(adapter[f"{ours}.{part}.{lora.LORA_B}"], expected)
        np.testing.assert_array_equal(adapter[f"{ours}.{part}.{lora.LORA_A}"], tensors[f"{start}.wqkv.lora_A.weight"])
    np.testing.assert_array_equal(adapter[f"{ours}.wo.{lora.LORA_B}"], tensors[f"{start}.wo.lora_B.weight"])


def test_types_of_half_width_are_read(tmp_path):
    spec, pet = spec_of("linear"), pet_config()
    adapter = random_adapter(spec, pet)
    folder = write_adapter(tmp_path / "a", pet, adapter, spec, "base")
    _change(folder, lambda tensors: tensors.update({n: a.astype(np.float16) for n, a in tensors.items()}))
    _, back = read_adapter(folder, spec)
    for name, array in adapter.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], array.astype(np.float16).astype(np.float32))


# ---- refused, by name


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder for the model of the case `linear`."""
    spec, pet = spec_of("linear"), pet_config()
    return write_adapter(tmp_path / "adapter", pet, random_adapter(spec, pet), spec, "base/of/it")


def _change(folder, change) -> None:
    """Let `change` work on the tensors of a folder, keeping the file's metadata."""
    file = open_tensor_file(folder / WEIGHTS)
    tensors = {name: file.read(name) for name in file.heads}
    change(tensors)
    heads = {name: head_of(array) for name, array in tensors.items()}
    with StagedFile(folder / WEIGHTS, 0) as staged:
        write_tensors(staged, heads, tensors.__getitem__, file.metadata)
        staged.commit()
    file.close()


def _configure(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("key, value", [
    ("peft_type", "ADALORA"), ("bias", "lora_only"), ("init_lora_weights", "pissa_niter_16"), ("fan_in_fan_out", True),
    ("lora_bias", True), ("use_qalora", True), ("modules_to_save", ["embed_tokens"]), ("ensure_weight_tying", True),
    ("layer_replication", [[0, 1]]), ("trainable_token_indices", [3]), ("target_parameters", ["x"]),
    ("alora_invocation_tokens", [1]), ("kasa_config", {"beta": 1}), ("of_the_future", 3), ("r", 0), ("r", "many"),
    ("rank_pattern", 3),
])  # fmt: skip
def test_a_key_that_changes_numbers_is_named(folder, key, value):
    _configure(folder, **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}: "):
        read_adapter(folder, spec_of("linear"))


def test_keys_that_change_nothing_pass(folder):
    before = read_adapter(folder, spec_of("linear"))[1]
    _configure(folder, peft_version="0.21.0", revision="main", layer_replication=None, eva_config=None, loftq_config={},
               megatron_core="megatron.core", inference_mode=False, of_the_future=False, runtime_config={"x": False})
    assert_same(read_adapter(folder, spec_of("linear"))[1], before)


def test_another_rank_is_named(folder):
    _configure(folder, r=4)
    with pytest.raises(UserError, match=r"q_proj: lora_A is \[3, 32\] and lora_B \[32, 3\], but .* says rank 4"):
        read_adapter(folder, spec_of("linear"))


def test_dora_without_magnitudes_is_named(folder):
    _configure(folder, use_dora=True)
    with pytest.raises(UserError, match=r"q_proj has lora_A, lora_B; lora_A, lora_B, lora_magnitude_vector are needed"):
        read_adapter(folder, spec_of("linear"))


def test_magnitudes_of_another_length_are_named(tmp_path):
    spec, pet = spec_of("linear"), pet_config(use_dora=True)
    folder = write_adapter(tmp_path / "a", pet, random_adapter(spec, pet), spec, "base")
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector"
    _change(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(UserError, match=r"k_proj: lora_magnitude_vector is \[15\], lora_B \[16, 3\]"):
        read_adapter(folder, spec)


def test_another_model_is_named(folder):
    with pytest.raises(UserError, match=r"wq is \[32, 32\] there and \[48, 32\] .*it was made for base/of/it"):
        read_adapter(folder, replace(spec_of("linear"), head_dim=12))
    with pytest.raises(UserError, match="model.layers.1.attention.wq: this model has no such linear layer"):
        spec, pet = spec_of("gqa"), pet_config()
        deep = write_adapter(folder.parent / "deep", pet, random_adapter(spec, pet), spec, "base")
        read_adapter(deep, spec_of("linear"))


@pytest.mark.parametrize("name", [
    "base_model.model.model.embed_tokens.weight", "base_model.model.model.embed_tokens.lora_embedding_A",
    "base_model.model.score.weight",
])  # fmt: skip
def test_a_tensor_that_is_no_factor_is_named(folder, name):
    _change(folder, lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)}))
    with pytest.raises(UserError, match=f"{name} is no factor of a LoRA"):
        read_adapter(folder, spec_of("linear"))


def test_damaged_folders_are_named(folder):
    (folder / "adapter_config.json").write_text('{"r": 3,\n')
    with pytest.raises(UserError, match=r"adapter_config\.json:2: not valid JSON"):
        read_adapter(folder, spec_of("linear"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"neither {WEIGHTS} nor adapter_model.bin"):
        read_adapter(folder, spec_of("linear"))
    assert not is_hf_adapter(folder.parent)


def test_what_cannot_be_written_is_refused(tmp_path):
    spec = spec_of("falcon_7b")
    pet = pet_config(target_modules="wq|wv", use_dora=True)
    with pytest.raises(UserError, match=r"query_key_value: DoRA on .*wq, .*wv but not on .*wk"):
        write_adapter(tmp_path / "a", pet, random_adapter(spec, pet), spec, "base")
    pet = pet_config()
    adapter = random_adapter(spec, pet)
    with pytest.raises(UserError, match="rank 4 of this model wants"):
        write_adapter(tmp_path / "a", pet.model_copy(update={"lora_rank": 4}), adapter, spec, "base")
    with pytest.raises(UserError, match="only LoRA's factors can be written"):
        write_adapter(tmp_path / "a", pet, adapter | {"model.norm_out.weight": np.ones(32, np.float32)}, spec, "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="new or empty folder"):
        write_adapter(tmp_path / "full", pet, adapter, spec, "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_fixed_weights_have_every_name():
    """The tests above compare models of these weights: a name that one side lacks would go unseen."""
    from llm_core.models.shapes import parameter_shapes

    spec = replace(spec_of("gqa"), qkv_concat=True)
    assert {name: array.shape for name, array in base_weights(spec).items()} == parameter_shapes(spec)
