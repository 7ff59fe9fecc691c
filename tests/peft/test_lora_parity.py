"""LoRA against Hugging Face's PEFT: one gradient, and fifty steps from the same start."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llm_core.config.model_section import LoraConfig
from llm_core.models.spec import DecoderSpec
from llm_core.peft.apply import build_net, is_adapter_name

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SPEC = DecoderSpec(
    vocab_size=48, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40, max_position=64
)
MODULES = {
    "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "lm_head": "lm_head",
}  # fmt: skip
FACTORS = {
    "mindpet_delta_lora_a": "lora_A.default.weight",
    "mindpet_delta_lora_b": "lora_B.default.weight",
    "mindpet_delta_lora_magnitude": "lora_magnitude_vector.default.weight",
}
KINDS = {
    "every linear, lm_head too": {"target_modules": ".*"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": "wq|w2"},
}


def their_name(name: str) -> str:
    """PEFT's name of one of our parameters."""
    *parents, leaf, kind = name.split(".")
    if kind == "embedding_weight":
        return "base_model.model.model.embed_tokens.weight"
    if name == "model.norm_out.weight":
        return "base_model.model.model.norm.weight"
    if leaf.endswith("_norm"):
        leaf = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}[leaf]
        return ".".join(["base_model.model", *parents, leaf, kind])
    path = [{"attention": "self_attn", "feed_forward": "mlp"}.get(part, part) for part in parents]
    return ".".join(["base_model.model", *path, MODULES[leaf], FACTORS.get(kind, kind)])


def pet_of(**values) -> LoraConfig:
    return LoraConfig(**{"pet_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "lora_b_init": "normal", **values})


def both(pet: LoraConfig) -> tuple:
    """Our net and PEFT's with the same weights; B is not zero, so that A has a gradient at once."""
    net = build_net(SPEC, pet, seed=11, adapter_seed=12)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    leaves = {name.split(".")[-2] for name in net.parameters_dict() if is_adapter_name(name)}
    theirs = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(
            r=pet.lora_rank, lora_alpha=pet.lora_alpha, lora_dropout=0.0, use_rslora=pet.use_rslora,
            use_dora=pet.use_dora, target_modules=sorted(MODULES[leaf] for leaf in leaves),
        ),
    )  # fmt: skip
    state = theirs.state_dict()
    named = {_with_base(their_name(name), state): name for name in net.parameters_dict()}
    assert {name for name in state if "rotary" not in name} == set(named)
    ours = {name: parameter.asnumpy() for name, parameter in net.parameters_dict().items()}
    theirs.load_state_dict({name: torch.tensor(ours[own]) for name, own in named.items()}, strict=False)
    return net, theirs, {own: name for name, own in named.items()}


def _with_base(name: str, state) -> str:
    """An adapted linear's own weight is called base_layer."""
    return name if name in state else name.replace(".weight", ".base_layer.weight")


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([1, step])
    tokens = ((rng.integers(0, 40, (3, 1)) + np.arange(17)[None] * 3) % 40 + 1).astype(np.int32)
    labels = tokens[:, 1:].copy()
    labels[0, :5] = -100
    return np.ascontiguousarray(tokens[:, :-1]), labels


def their_loss(model, tokens: np.ndarray, labels: np.ndarray):
    logits = model(torch.tensor(tokens).long()).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).long().flatten())


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


@pytest.fixture(scope="module", params=KINDS)
def fifty_steps(request) -> SimpleNamespace:
    """First gradients, losses and final adapters of both sides, trained with AdamW."""
    from llm_core.models.heads import training_loss
    from llm_core.train.optim import build_optimizer
    from llm_core.train.step import Stepper

    pet = pet_of(**KINDS[request.param])
    net, theirs, names = both(pet)
    base = {n: p.asnumpy().copy() for n, p in net.parameters_dict().items() if not is_adapter_name(n)}
    settings = SimpleNamespace(type="AdamW", betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    optimizer = build_optimizer(settings, net.trainable_params())
    stepper = Stepper(training_loss(net), optimizer, graph_key={"spec": SPEC, **net.graph_key})
    matrices = [p for p in theirs.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    their_optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.99), eps=1e-8)

    ours, losses, first = {}, ([], []), {}
    for step in range(50):
        tokens, labels = batch(step)
        result = stepper.run([(tokens, labels)], lr=2e-3, scale=1.0, update=step + 1, step=step)
        losses[0].append(result.loss)
        loss = their_loss(theirs, tokens, labels)
        their_optimizer.zero_grad()
        loss.backward()
        if step == 0:  # Adam's first moment is a tenth of the gradient
            states = {state.name: state.asnumpy() for state in optimizer.states}
            gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
            first = {
                p.name: (states[f"adam_m.{p.name}"] / 0.1, gradients[names[p.name]].numpy().copy())
                for p in net.trainable_params()
            }
        their_optimizer.step()
        losses[1].append(loss.item())
    state = theirs.state_dict()
    ours = {p.name: (p.asnumpy(), state[names[p.name]].numpy()) for p in net.trainable_params()}
    changed = [n for n, value in base.items() if not np.array_equal(value, net.parameters_dict()[n].asnumpy())]
    return SimpleNamespace(first=first, losses=losses, adapters=ours, changed=changed)


def test_gradients(fifty_steps):
    assert fifty_steps.first
    for name, (ours, theirs) in fifty_steps.first.items():
        assert relative(ours, theirs) < 1e-5, name


def test_losses(fifty_steps):
    ours, theirs = map(np.array, fifty_steps.losses)
    assert ours[-5:].mean() < ours[:5].mean() - 0.005  # something is learnt
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_adapters(fifty_steps):
    for name, (ours, theirs) in fifty_steps.adapters.items():
        assert relative(ours, theirs) < 1e-3, name


def test_the_base_has_not_moved(fifty_steps):
    assert not fifty_steps.changed
