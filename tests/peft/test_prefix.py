"""Prefix tuning and p-tuning v2 on a model: forward, gradients, initial values, generation, refusals."""

from __future__ import annotations

import importlib
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import prefix_oracle
import pytest

from llm_core.config import load_config
from llm_core.config.model_section import PrefixTuningConfig, PTuning2Config
from llm_core.errors import UserError
from llm_core.models.spec import DecoderSpec
from llm_core.peft import prefix
from llm_core.peft.apply import adapter_shapes, build_net, is_adapter_name

POSITIONS, BATCH, LENGTH, VOCAB = 5, 3, 12, 48
LLAMA = DecoderSpec(
    vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40,
    max_position=128, initializer_range=0.3,
)  # fmt: skip
FALCON = replace(LLAMA, norm="layer", mlp="gelu", tied_head=True)
SPECS = {
    "llama": LLAMA,
    "internlm": replace(LLAMA, num_kv_heads=4, qkv_bias=True, output_bias=True),
    "concat": replace(LLAMA, qkv_concat=True),
    "falcon_rw": replace(
        FALCON, num_kv_heads=4, position="alibi", qkv_bias=True, output_bias=True, mlp_bias=True
    ),
    "falcon_7b": replace(FALCON, num_kv_heads=1, residual="parallel"),
    "falcon_40b": replace(FALCON, residual="parallel_two_norms"),
}
PREFIX = PrefixTuningConfig(
    pet_type="prefixtuning", prefix_token_num=POSITIONS, mid_dim=12, dropout_rate=0.25
)
DIRECT = PTuning2Config(pet_type="ptuning2", pre_seq_len=POSITIONS, dropout_prob=0.25)
PROJECTED = PTuning2Config(pet_type="ptuning2", pre_seq_len=POSITIONS, prefix_projection=True, projection_dim=7)
CASES = [
    ("llama", PREFIX, "cpu"), ("llama", PREFIX, "reference"), ("llama", DIRECT, "cpu"), ("internlm", PROJECTED, "cpu"),
    ("concat", PREFIX, "cpu"), ("falcon_rw", PREFIX, "cpu"), ("falcon_rw", DIRECT, "reference"),
    ("falcon_7b", PREFIX, "cpu"), ("falcon_40b", DIRECT, "cpu"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def graph_mode():
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


@pytest.fixture
def use(monkeypatch):
    """use(backend): the operators of "cpu" or "reference" from now on; skips where there are no kernels."""
    from llm_core import ops

    def use(name: str) -> None:
        if name == "cpu":
            if ops.backend().name != "cpu":
                pytest.skip(ops.backend().reason)
            return
        chosen = ops.Backend(name, "a test", importlib.import_module(f"llm_core.ops.{name}"))
        monkeypatch.setattr(ops, "backend", lambda: chosen)
        monkeypatch.setenv("RUN_LLM_COMPILE_CACHE", "0")  # its keys name the kernels

    return use


def fill(net, size: float = 1.0) -> None:
    """Weights that make every part of the model count; a larger `size` makes its next token less of a close call."""
    from mindspore import Tensor

    for name, parameter in net.parameters_dict().items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.shape)
        scale = 0.3 * size if is_adapter_name(name) else 0.1 * size
        values = scale * values + ("norm" in name and name.endswith("weight"))
        parameter.set_data(Tensor(values.astype(np.float32)))


def float64_weights(net) -> dict[str, np.ndarray]:
    return {name: parameter.asnumpy().astype(np.float64) for name, parameter in net.parameters_dict().items()}


def data() -> tuple[np.ndarray, np.ndarray]:
    """tokens and labels int32 [BATCH, LENGTH]; some labels ignored, one row padded on the right."""
    random = np.random.RandomState(3)
    tokens = random.randint(1, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    labels = random.randint(1, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    labels[0, :3] = -100
    tokens[1, 8:], labels[1, 7:] = 0, -100
    return tokens, labels


def results(net) -> SimpleNamespace:
    """Loss, gradients by name of what learns, and logits, out of one graph."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from llm_core.models.heads import TokenLoss

    class Step(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.weights = ms.ParameterTuple(net.trainable_params())
            self.net, self.loss = net, TokenLoss(net)
            self.value_and_grad = ops.value_and_grad(self.loss, None, self.weights, has_aux=True)

        def construct(self, tokens, labels):
            (loss, _), gradients = self.value_and_grad(tokens, labels)
            return loss, gradients, self.net(tokens)

    step = Step()
    loss, gradients, logits = step(*map(Tensor, data()))
    by_name = {weight.name: each.asnumpy() for weight, each in zip(step.weights, gradients, strict=True)}
    return SimpleNamespace(loss=float(loss), gradients=by_name, logits=logits.asnumpy())


@pytest.mark.parametrize("family, pet, backend", CASES, ids=lambda each: getattr(each, "pet_type", each))
def test_forward_and_gradients_are_those_of_a_plain_decoder_in_float64(use, family, pet, backend):
    use(backend)
    spec = SPECS[family]
    net = build_net(spec, pet, seed=0)
    fill(net)
    ours = results(net)
    weights = float64_weights(net)
    kind, (tokens, labels) = pet.pet_type, data()

    def loss(changed: dict[str, np.ndarray]) -> float:
        weights_now = {**weights, **changed}
        return prefix_oracle.loss(weights_now, spec, tokens, labels, prefix_oracle.prefix_of(weights_now, spec, kind))

    expected = prefix_oracle.logits(weights, spec, tokens, prefix_oracle.prefix_of(weights, spec, kind))
    nothing = [(each[0][:0], each[1][:0]) for each in prefix_oracle.prefix_of(weights, spec, kind)]
    assert np.abs(prefix_oracle.logits(weights, spec, tokens, nothing) - expected).max() > 0.01  # it does something
    assert np.abs(ours.logits - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert abs(ours.loss / loss({}) - 1) < 1e-5
    assert set(ours.gradients) == set(adapter_shapes(spec, pet))  # the base learns nothing
    for name, gradient in ours.gradients.items():
        check_gradient(name, gradient.astype(np.float64), weights[name], loss)


def check_gradient(name: str, gradient: np.ndarray, weight: np.ndarray, loss) -> None:
    """The slope of `loss` along the gradient, and along two other directions, by central differences in float64."""
    size = np.linalg.norm(gradient)
    assert size > 1e-3, name
    random = np.random.RandomState(5)
    for direction in (gradient, random.standard_normal(weight.shape), np.sign(random.standard_normal(weight.shape))):
        step = 1e-4 * direction / np.linalg.norm(direction)
        slope = (loss({name: weight + step}) - loss({name: weight - step})) / 2e-4
        ours = (gradient * direction).sum() / np.linalg.norm(direction)
        assert abs(slope - ours) < 2e-5 * size, name


@pytest.mark.parity
def test_transformers_with_the_prefix_as_its_cache_agrees():
    """HF's Llama: un-rotated prefix keys as past_key_values, tokens from position 0; gradients by torch's autograd."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from llm_core.checkpoint.hf import from_hf

    net = build_net(LLAMA, PREFIX, seed=0)
    fill(net)
    ours = results(net)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=128, rms_norm_eps=LLAMA.norm_eps, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    weights = {name: torch.from_numpy(each.asnumpy().copy()) for name, each in net.parameters_dict().items()}
    theirs.load_state_dict({name: weights[from_hf(name)] for name in theirs.state_dict()})
    adapter = {name: value.requires_grad_() for name, value in weights.items() if is_adapter_name(name)}
    table, *mlp = (adapter[name] for name in adapter_shapes(LLAMA, PREFIX))
    channels = torch.tanh(table @ mlp[0].T + mlp[1]) @ mlp[2].T + mlp[3]
    per_layer = channels.reshape(POSITIONS, 2, 2, LLAMA.num_kv_heads, LLAMA.head_dim).permute(1, 2, 3, 0, 4)
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(per_layer):
        cache.update(keys.expand(BATCH, -1, -1, -1), values.expand(BATCH, -1, -1, -1), layer)
    tokens, labels = (torch.from_numpy(each.astype(np.int64)) for each in data())
    logits = theirs(
        tokens,
        past_key_values=cache,
        attention_mask=torch.ones(BATCH, POSITIONS + LENGTH, dtype=torch.int64),
        position_ids=torch.arange(LENGTH)[None],
    ).logits
    torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), reduction="sum").backward()
    assert np.abs(ours.logits - logits.detach().numpy()).max() < 1e-5 * float(logits.detach().abs().max())
    for name, value in adapter.items():
        gradient = value.grad.numpy()
        assert np.linalg.norm(ours.gradients[name] - gradient) < 1e-5 * np.linalg.norm(gradient), name


# ---- the adapter's parameters ----


def test_names_and_shapes_are_upstreams():
    """Without grouped heads keys and values have the width of the hidden states, and shapes are MindFormers' too."""
    spec = SPECS["internlm"]
    channels = 2 * spec.num_layers * spec.hidden_size
    assert adapter_shapes(spec, PREFIX) == {
        "mindpet_delta_prefixtuning_embedding.embedding_table": (POSITIONS, channels),
        "mindpet_delta_prefixtuning_trans.0.weight": (12, channels),
        "mindpet_delta_prefixtuning_trans.0.bias": (12,),
        "mindpet_delta_prefixtuning_trans.2.weight": (channels, 12),
        "mindpet_delta_prefixtuning_trans.2.bias": (channels,),
    }
    assert adapter_shapes(spec, DIRECT) == {"mindpet_delta_ptuning2_embedding.embedding_table": (POSITIONS, channels)}
    assert adapter_shapes(LLAMA, DIRECT)["mindpet_delta_ptuning2_embedding.embedding_table"] == (POSITIONS, 64)


@pytest.mark.parametrize("pet", [PREFIX, DIRECT, PROJECTED])
def test_the_network_has_these_parameters_and_trains_no_other(pet):
    net = build_net(LLAMA, pet, seed=0)
    learning = {parameter.name: parameter.shape for parameter in net.trainable_params()}
    assert learning == adapter_shapes(LLAMA, pet)
    assert {name for name in net.parameters_dict() if is_adapter_name(name)} == set(learning)


def test_initial_values_follow_the_adapters_seed():
    def table(seed):
        return build_net(LLAMA, DIRECT, seed=0, adapter_seed=seed).model.prefix.table.asnumpy()

    assert np.array_equal(table(1), table(1))
    assert np.abs(table(1) - table(2)).max() > 0.1
    assert abs(table(1).std() - LLAMA.initializer_range) < 0.1 * LLAMA.initializer_range
    keys = [keys.asnumpy() for keys, _ in build_net(LLAMA, PREFIX, seed=0).model.prefix(None)]
    assert min(np.abs(each[0] - each[1]).max() for each in keys) > 0.1  # its positions are not all alike


def test_products_in_bfloat16_leave_the_prefix_in_float32():
    from mindspore import Tensor

    logits, keys = [], []
    for dtype in ("float32", "bfloat16"):
        net = build_net(replace(LLAMA, compute_dtype=dtype), PREFIX, seed=0)
        fill(net)
        logits.append(net(Tensor(data()[0])).asnumpy())
        keys.append(net.model.prefix(None)[1][0].asnumpy())
    assert np.array_equal(*keys)
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[0]).max()


def test_dropout_is_a_function_of_the_key():
    from mindspore import Tensor

    from llm_core.ops import dropout_key

    net = build_net(LLAMA, PREFIX, seed=0)

    def values(key) -> np.ndarray:
        given = None if key is None else Tensor(key)
        return np.stack([each.asnumpy() for pair in net.model.prefix(given) for each in pair])

    whole, first = values(None), values(dropout_key(1, 0))
    kept = first != 0
    assert 0.6 < kept.mean() < 0.9  # a rate of 0.25
    np.testing.assert_allclose(first[kept], whole[kept] / 0.75, rtol=1e-6)
    assert np.array_equal(first, values(dropout_key(1, 0)))
    assert not np.array_equal(first, values(dropout_key(1, 1)))
    assert not np.array_equal(first, values(dropout_key(1, 0, micro_batch=1)))


def test_a_file_of_mindformers_loads_and_another_prefix_is_named(tmp_path):
    """Its tensors are float16, and it holds the numbers of the positions beside them."""
    from safetensors.numpy import save_file

    from llm_core.peft.adapters import load_adapter, read_adapter

    spec = SPECS["internlm"]
    random = np.random.RandomState(1)
    shapes = adapter_shapes(spec, PREFIX)
    values = {name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    path = tmp_path / "prefix.safetensors"
    save_file({**values, "mindpet_delta_prefixtuning_prefix": np.arange(POSITIONS)}, path)
    net = build_net(spec, PREFIX, seed=0)
    load_adapter(net, read_adapter(path, spec, PREFIX))
    for parameter in net.trainable_params():
        assert np.array_equal(parameter.asnumpy(), values[parameter.name].astype(np.float32))
    with pytest.raises(UserError, match="names are those of prefix tuning. Add .*pet_config"):
        read_adapter(path, spec)
    longer = PREFIX.model_copy(update={"prefix_token_num": POSITIONS + 1})
    with pytest.raises(UserError, match=r"embedding_table is \[5, 128\], here \[6, 128\]"):
        read_adapter(path, spec, longer)
    with pytest.raises(UserError, match="does not fit"):
        read_adapter(path, LLAMA, PREFIX)  # grouped heads


# ---- generation ----

PROMPTS = [[1, 5, 9], [1, *range(20, 45)], [7]]


def uncached(net, prompt: list[int], count: int) -> list[int]:
    """Greedy search by running the whole text through the model for every token."""
    import mindspore as ms

    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(net(ms.Tensor(padded)).asnumpy()[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "family, pet, backend",
    [("llama", PREFIX, "cpu"), ("llama", DIRECT, "reference"), ("falcon_rw", PREFIX, "cpu")],
    ids=lambda each: getattr(each, "pet_type", each),
)
def test_cached_and_padded_answers_are_the_uncached_ones(use, monkeypatch, family, pet, backend):
    """A batch of unequal prompts, read in pieces, in a cache that grows; then with other weights in the same graphs."""
    use(backend)
    from llm_core.infer import batch
    from llm_core.infer.generate import Generator
    from llm_core.infer.sampling import SamplingParams

    monkeypatch.setattr(batch, "PREFILL_COLUMNS", (16,))
    monkeypatch.setattr(batch, "FIRST_CACHE", 64)
    monkeypatch.setattr(batch, "ROOM_BEHIND_PROMPT", 16)
    net = build_net(SPECS[family], pet, seed=3)
    fill(net, 4.0)
    net.set_train(False)
    generator = Generator(net, net.spec, eos_ids=[], pad_id=0)
    params = SamplingParams(max_new_tokens=48)
    answers = [answer.token_ids for answer in generator.generate(PROMPTS, params)]
    assert len(generator.decoders.caches) == 2  # the cache has grown
    assert answers == [uncached(net, prompt, 48) for prompt in PROMPTS]
    assert max(len(set(answer)) for answer in answers) > 4  # not stuck, or the comparison says little
    table = net.model.prefix.table
    table.set_data(table * -2.0)
    changed = [answer.token_ids for answer in generator.generate(PROMPTS, params)]
    assert changed != answers
    assert changed == [uncached(net, prompt, 48) for prompt in PROMPTS]


@pytest.mark.slow
def test_other_searches_keep_the_prefix_of_every_row():
    """Beams and candidates copy rows, an assistant's guesses are read several at a time and forgotten again."""
    from llm_core.infer.generate import Generator
    from llm_core.infer.sampling import SamplingParams

    spec = replace(LLAMA, num_layers=1)  # many graphs: each compiles faster
    net = build_net(spec, PREFIX, seed=3)
    fill(net, 4.0)
    net.set_train(False)
    generator = Generator(net, net.spec, eos_ids=[], pad_id=0)
    for params in (
        SamplingParams(max_new_tokens=20, num_beams=3),
        SamplingParams(max_new_tokens=20, penalty_alpha=0.4, top_k=4),
    ):
        together = [answer.token_ids for answer in generator.generate(PROMPTS, params)]
        alone = [generator.generate([prompt], params)[0].token_ids for prompt in PROMPTS]
        assert together == alone
    base = build_net(spec, None, seed=3)
    fill(base, 4.0)
    assistant = Generator(base.set_train(False), spec, eos_ids=[], pad_id=0)
    params = SamplingParams(max_new_tokens=20, assistant=assistant)
    assert [answer.token_ids for answer in generator.generate(PROMPTS, params)] == [
        uncached(net, prompt, 20) for prompt in PROMPTS
    ]


def test_the_layer_operator_takes_a_prefix(use):
    """Llama's next tokens still go through one operator a layer."""
    use("cpu")
    from llm_core.models.cache import CachedDecoder

    assert CachedDecoder(build_net(LLAMA, PREFIX, seed=0), 2, 64).whole_layer is not None


# ---- refusals ----


@pytest.mark.parametrize("pet", [PREFIX, DIRECT])
def test_a_prefix_longer_than_the_context_is_refused(pet):
    short = replace(LLAMA, max_position=POSITIONS - 1)
    for refused in (lambda: prefix.shapes(short, pet), lambda: build_net(short, pet, seed=0)):
        with pytest.raises(UserError, match=f"pet_config.{prefix.facts(pet).length_key}: 5 .* context of 4 tokens"):
            refused()
    prefix.shapes(replace(LLAMA, max_position=POSITIONS), pet)


@pytest.mark.parametrize(
    "pet, key", [("pet_type: prefixtuning", "prefix_token_num"), ("pet_type: ptuning2", "pre_seq_len")]
)
def test_a_run_file_with_such_a_prefix_names_its_line(tmp_path, pet, key):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n  arch: {type: LlamaForCausalLM}\n  model_config:\n    type: LlamaConfig\n    seq_length: 64\n"
        f"    pet_config:\n      {pet}\n      {key}: 65\n"
    )
    with pytest.raises(UserError, match=rf"run.yaml:8: .*{key} 65 .*seq_length .*64"):
        load_config(path)
