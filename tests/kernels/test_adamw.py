"""AdamW's update and the squared norm, on every instruction set, against fp64 and torch."""

from __future__ import annotations

import numpy as np
import pytest
from elementwise import called, normal, placed, relative
from openmp_threads import for_thread_counts

from llm_core.kernels import KernelError

ADAMW = ["param", "m", "v", "grad", "scalars", "done"]
SHAPES = [(), (1,), (17,), (3, 5), (2, 3, 4, 5), (5, 8200)]


def settings(step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, decay=0.1, coef=1.0, corrected=True) -> np.ndarray:
    return np.array([lr, *betas, eps, decay, coef, step, corrected], np.float32)


def adamw(param, m, v, grad, step, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, decay=0.1, coef=1.0, corrected=True):
    """One update in fp64: the new param, m, v."""
    grad = grad * coef
    m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
    m_scale, v_scale = (1 - betas[0] ** step, 1 - betas[1] ** step) if corrected else (1, 1)
    return param * (1 - lr * decay) - lr * (m / m_scale) / (np.sqrt(v / v_scale) + eps), m, v


def run(kernels, state, grad, scalars):
    """One update of param, m, v in place."""
    done = np.zeros(1, np.float32)
    kernels.call("adamw", *state, grad, scalars, outputs=[done])
    assert done[0] == 1


def start(shape) -> list[np.ndarray]:
    return [normal(1, *shape), np.zeros(shape, np.float32), np.zeros(shape, np.float32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"corrected": False, "eps": 1e-6}, {"coef": 0.125, "decay": 0.0}, {"betas": (0.8, 0.95), "eps": 1e-3}],
    ids=["torch", "uncorrected", "coef", "betas"],
)
def test_updates(kernels, shape, options):
    state = start(shape)
    wanted = [a.astype(np.float64) for a in state]
    before = state[0].copy()
    for step in range(1, 6):
        grad = normal(10 + step, *shape)
        run(kernels, state, grad, settings(step, **options))
        wanted = adamw(*wanted[:3], grad.astype(np.float64), step, **options)
    for found, exact in zip(state, wanted, strict=True):
        assert relative(found, exact) < 3e-7
    # a parameter near 1 that moves by 0.02 is rounded five times
    assert relative(state[0] - before, wanted[0] - before.astype(np.float64)) < 1e-5


def test_late_steps(kernels):
    """One minus a beta near 1, and its powers, keep their digits."""
    state = [normal(1, 40), normal(2, 40), normal(3, 40) ** 2]
    for step in (1, 1000, 100_000):
        found, grad = [a.copy() for a in state], normal(step, 40)
        run(kernels, found, grad, settings(step, decay=0.0))
        wanted = adamw(*(a.astype(np.float64) for a in (*state, grad)), step, decay=0.0)
        assert relative(found[0] - state[0], wanted[0] - state[0]) < 1e-5
        assert relative(found[2], wanted[2]) < 2e-7


def test_a_small_decay_keeps_its_digits(kernels):
    """The float next to 1 - 1e-6 is 1.3 % off."""
    before = 1 + np.random.default_rng(1).random(10_000).astype(np.float32)
    state = [before.copy(), np.zeros_like(before), np.zeros_like(before)]
    run(kernels, state, np.zeros_like(before), settings(1, lr=1e-4, decay=1e-2))
    assert ((before - state[0]) / before).mean(dtype=np.float64) == pytest.approx(1e-6, rel=2e-3)


def test_every_number_of_threads_and_every_place_gives_the_same_bits(kernels):
    grad = normal(5, 7, 8191)

    def one(offset: int = 0):
        state = [placed(a, offset) for a in (normal(1, 7, 8191), normal(2, 7, 8191), normal(3, 7, 8191) ** 2)]
        run(kernels, state, placed(grad, (offset + 4) % 64), settings(3))
        return np.stack(state)

    first, *others = for_thread_counts(kernels, one)
    for other in (*others, one(16), one(40), one(60)):
        np.testing.assert_array_equal(first, other)


def test_bad_gradients_reach_their_own_parameter_only(kernels):
    state, grad = start((2, 19)), normal(2, 2, 19)
    grad[1, 18], grad[0, 3] = np.nan, np.inf
    run(kernels, state, grad, settings(1))
    for array in state:
        assert not np.isfinite(array[1, 18]) and np.isfinite(array).sum() >= array.size - 2


@pytest.mark.parametrize("name", ADAMW)
def test_wrong_arguments_of_adamw_are_named(kernels, name):
    index = ADAMW.index(name)
    arrays = [*(np.ones((2, 3), np.float32) for _ in range(4)), settings(1), np.zeros(1, np.float32)]
    for wrong in (arrays[index].astype(np.int32), np.ones((2, 7), np.float32)):
        if name == "param" and wrong.dtype == np.float32:
            continue  # it sets the shape
        changed = [*arrays[:index], wrong, *arrays[index + 1 :]]
        with pytest.raises(KernelError, match=rf"adamw: {name}: expected float32 .* got"):
            kernels.call("adamw", *changed[:5], outputs=changed[5:])


@pytest.mark.parametrize("shape", [*SHAPES, (1023,), (1025,), (65537,), (1, 2, 1, 3, 1, 2, 1, 5)])
def test_squared_norm(kernels, shape):
    x = normal(1, *shape)
    (found,) = called(kernels, "squared_norm", x, shapes=[(1,)])
    wanted = np.float64((x.astype(np.float64) ** 2).sum())
    assert found[0] == pytest.approx(wanted, rel=2e-7)


def test_a_long_sum_keeps_its_digits(kernels):
    x = np.full(5_000_000, 0.1, np.float32)
    (found,) = called(kernels, "squared_norm", x, shapes=[(1,)])
    assert found[0] == pytest.approx(x.size * np.float64(x[0]) ** 2, rel=3e-7)


def test_squared_norm_has_the_same_bits_for_every_number_of_threads_and_place(kernels):
    x = normal(1, 300_001)
    results = for_thread_counts(kernels, lambda: called(kernels, "squared_norm", x, shapes=[(1,)])[0][0])
    results += [called(kernels, "squared_norm", placed(x, at), shapes=[(1,)])[0][0] for at in (4, 16, 60)]
    assert len(set(results)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("at", [0, 1024, 70_000, 70_002])
def test_an_overflow_shows_in_the_squared_norm(kernels, bad, at):
    x = normal(1, 70_003)
    x[at] = bad
    (found,) = called(kernels, "squared_norm", x, shapes=[(1,)])
    assert not np.isfinite(found[0])


def test_wrong_arguments_of_squared_norm_are_named(kernels):
    with pytest.raises(KernelError, match=r"squared_norm: x: expected float32 .*, got int32 \[3\]"):
        called(kernels, "squared_norm", np.zeros(3, np.int32), shapes=[(1,)])
    with pytest.raises(KernelError, match="squared_norm: x: at most 8 dimensions"):
        called(kernels, "squared_norm", np.zeros([1] * 9, np.float32), shapes=[(1,)])
    with pytest.raises(KernelError, match=r"squared_norm: total: expected float32 \[1\]"):
        called(kernels, "squared_norm", np.zeros(3, np.float32), shapes=[(2,)])


@pytest.mark.parity
def test_five_updates_are_torchs(kernels):
    torch = pytest.importorskip("torch")
    state = start((31, 7))
    param = torch.nn.Parameter(torch.tensor(state[0]))
    optimizer = torch.optim.AdamW([param], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = normal(10 + step, 31, 7)
        param.grad = torch.tensor(grad)
        optimizer.step()
        run(kernels, state, grad, settings(step))
    wanted = [param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]
    for found, exact in zip(state, wanted, strict=True):
        assert relative(found, exact.numpy()) < 5e-7
