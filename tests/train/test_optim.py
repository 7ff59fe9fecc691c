"""Optimizers against torch.optim, and against their formulas in numpy where torch lacks them or is absent."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from llm_core.errors import UserError
from llm_core.train.optim import build_optimizer, takes_decay

STEPS = 20
SHAPES = {"wq.weight": (24, 16), "norm.weight": (16,), "wq.bias": (24,), "embedding_weight": (50, 16)}
DECAYED = {"wq.weight", "embedding_weight"}


def start_values():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in SHAPES.items()}


def parameters():
    return [Parameter(Tensor(value), name=name) for name, value in start_values().items()]


def gradients(step):
    rng = np.random.default_rng(100 + step)
    sizes = 10.0 ** rng.uniform(-4, 0, len(SHAPES))
    return {
        name: rng.normal(0, size, shape).astype(np.float32)
        for (name, shape), size in zip(SHAPES.items(), sizes, strict=True)
    }


def learning_rate(step):
    return 1e-3 * (1 + step % 5)


def config(kind, **values):
    return SimpleNamespace(type=kind, **values)


COEF = 0.125  # what the step multiplies its gradients with: clipping, loss scale


def run(cfg):
    """The parameters after STEPS updates, as numpy; also the optimizer."""
    ms.set_context(mode=ms.GRAPH_MODE)
    params = parameters()
    optimizer = build_optimizer(cfg, params)
    for step in range(STEPS):
        # a plain tuple of tensors would be a constant, and every step a compile
        grads = ms.mutable(tuple(Tensor(g / np.float32(COEF)) for g in gradients(step).values()))
        optimizer(grads, *(Tensor(value, ms.float32) for value in (learning_rate(step), step + 1.0, COEF)))
    return {p.name: p.asnumpy() for p in params}, optimizer


def relative(a, b):
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def assert_close(ours, theirs, tolerance=1e-6):
    worst = {name: relative(ours[name], theirs[name]) for name in SHAPES}
    assert max(worst.values()) < tolerance, worst


def torch_run(make):
    torch = pytest.importorskip("torch")
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start_values().items()}
    groups = [
        {"params": [p for name, p in params.items() if name in DECAYED]},
        {"params": [p for name, p in params.items() if name not in DECAYED], "weight_decay": 0.0},
    ]
    optimizer = make(torch.optim, groups)
    for step in range(STEPS):
        for name, grad in gradients(step).items():
            params[name].grad = torch.tensor(grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in params.items()}


PAIRS = {
    "adamw": (
        config("AdamW", betas=[0.9, 0.95], eps=1e-6, weight_decay=0.1),
        lambda optim, groups: optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    "adamw_defaults": (
        config("adamw", weight_decay=0.01),
        lambda optim, groups: optim.AdamW(groups, weight_decay=0.01),
    ),
    "adam_l2": (
        config("adam", beta1=0.8, beta2=0.99, weight_decay=0.05),
        lambda optim, groups: optim.Adam(groups, betas=(0.8, 0.99), weight_decay=0.05),
    ),
    "sgd": (config("SGD"), lambda optim, groups: optim.SGD(groups)),
    "sgd_momentum": (
        config("sgd", momentum=0.9, weight_decay=0.1),
        lambda optim, groups: optim.SGD(groups, momentum=0.9, weight_decay=0.1),
    ),
    "sgd_nesterov": (
        config("SGD", momentum=0.9, nesterov=True),
        lambda optim, groups: optim.SGD(groups, momentum=0.9, nesterov=True),
    ),
    "adagrad": (
        config("Adagrad", weight_decay=0.1),
        lambda optim, groups: optim.Adagrad(groups, initial_accumulator_value=0.1, eps=0.0, weight_decay=0.1),
    ),
    "adafactor": (
        config("Adafactor", weight_decay=0.1),
        lambda optim, groups: optim.Adafactor(groups, weight_decay=0.1),
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("pair", PAIRS)
def test_equal_to_torch(pair):
    cfg, make = PAIRS[pair]
    assert_close(run(cfg)[0], torch_run(make))


@pytest.mark.parametrize("kind", ["FP32StateAdamWeightDecay", "AdamW", "Adam"])
def test_adam_family_follows_its_formula(kind):
    beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 0.1
    p = {name: value.astype(np.float64) for name, value in start_values().items()}
    m = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(STEPS):
        lr = learning_rate(step)
        for name, grad in gradients(step).items():
            grad = grad.astype(np.float64)
            if name in DECAYED:
                if kind == "Adam":
                    grad = grad + decay * p[name]
                else:
                    p[name] *= 1 - lr * decay
            m[name] = beta1 * m[name] + (1 - beta1) * grad
            v[name] = beta2 * v[name] + (1 - beta2) * grad**2
            corrected = kind != "FP32StateAdamWeightDecay"
            m_hat = m[name] / (1 - beta1 ** (step + 1)) if corrected else m[name]
            v_hat = v[name] / (1 - beta2 ** (step + 1)) if corrected else v[name]
            p[name] -= lr * m_hat / (np.sqrt(v_hat) + eps)
    ours, optimizer = run(config(kind, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay))
    assert_close(ours, p)
    states = {state.name: state.asnumpy() for state in optimizer.states}
    assert set(states) == {f"{slot}.{name}" for slot in ("adam_m", "adam_v") for name in SHAPES}
    for name in SHAPES:
        assert relative(states[f"adam_m.{name}"], m[name]) < 1e-5
        assert relative(states[f"adam_v.{name}"], v[name]) < 1e-4  # 1 - beta2 in fp32 is 5e-5 off


def test_decay_spares_vectors_and_biases():
    def parameter(name, shape):
        return Parameter(Tensor(np.zeros(shape, np.float32)), name=name)

    assert {name for name, shape in SHAPES.items() if takes_decay(parameter(name, shape))} == DECAYED
    assert not takes_decay(parameter("router.bias", (2, 2)))


def test_adafactor_keeps_rows_and_columns_only():
    optimizer = build_optimizer(config("adafactor"), parameters())
    sizes = {state.name: state.shape for state in optimizer.states}
    assert sizes["adafactor_row.wq.weight"] == (24, 1)
    assert sizes["adafactor_column.wq.weight"] == (1, 16)


@pytest.mark.parametrize(
    "cfg, words",
    [
        (config("AdamX"), "AdamX"),
        (config("AdamW", betas=[0.9, 1.0]), "betas"),
        (config("AdamW", eps=0.0), "eps"),
    ],
)
def test_bad_settings_are_refused(cfg, words):
    with pytest.raises(UserError, match=words):
        build_optimizer(cfg, [Parameter(Tensor(np.zeros((2, 2), np.float32)), name="w")])


def test_no_parameter_is_refused():
    with pytest.raises(UserError, match="no parameter is trainable"):
        build_optimizer(config("AdamW"), [])
