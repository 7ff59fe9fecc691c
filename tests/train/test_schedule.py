"""Learning rate series, exact where a formula or upstream gives them."""

import math
from types import SimpleNamespace

import pytest

from llm_core.errors import UserError
from llm_core.train.schedule import ALIASES, build_schedule


def schedule(kind, total=100, per_epoch=20, optimizer_rate=None, **values):
    section = SimpleNamespace(type=kind, **values)
    return build_schedule(section, SimpleNamespace(learning_rate=optimizer_rate), total, per_epoch)


def series(function, steps):
    return [round(function(step), 12) for step in steps]


def test_cosine_gives_upstreams_figures():
    lr = schedule("CosineWithWarmUpLR", learning_rate=1e-3, warmup_steps=10)
    assert [float(f"{lr(s):.4g}") for s in (0, 5, 10, 50, 100)] == [0, 5e-4, 1e-3, 5.868e-4, 0]


def test_constant():
    lr = schedule("ConstantWarmUpLR", learning_rate=2.0, warmup_steps=4, warmup_lr_init=1.0)
    assert series(lr, (0, 1, 2, 4, 1000)) == [1.0, 1.25, 1.5, 2.0, 2.0]


def test_linear_ends_at_lr_end():
    lr = schedule("linear", learning_rate=1.0, warmup_steps=20, lr_end=0.2)
    assert series(lr, (0, 10, 20, 60, 100, 150)) == [0, 0.5, 1.0, 0.6, 0.2, 0.2]


def test_cosine_with_restarts_starts_again():
    lr = schedule("cosine_with_restarts", learning_rate=1.0, num_cycles=2.0)
    assert series(lr, (0, 25, 50, 75, 100)) == [1.0, 0.5, 1.0, 0.5, 0.0]


def test_cosine_decay_steps_cut_it_off():
    lr = schedule("cosine", learning_rate=1.0, lr_end=0.1, decay_steps=50)
    assert lr(49) > 0.5 and lr(50) == 0.1


def test_polynomial_counts_from_the_end_of_the_warm_up():
    lr = schedule("polynomial", learning_rate=1.0, warmup_steps=20, power=2.0, lr_end=0.0)
    assert series(lr, (20, 60, 99, 100, 120)) == [1.0, 0.25, round((1 / 80) ** 2, 12), 0, 0]
    with pytest.raises(UserError, match="lr_end"):
        schedule("polynomial", learning_rate=1.0, lr_end=1.0)


def test_annealing_comes_back_up():
    lr = schedule("CosineAnnealingLR", base_lr=1.0, t_max=10, eta_min=0.5)
    assert series(lr, (0, 5, 10, 20)) == [1.0, 0.75, 0.5, 1.0]


@pytest.mark.parametrize("growth, restarts", [(1, (0, 4, 8, 12)), (2, (0, 4, 12, 28))])
def test_warm_restarts(growth, restarts):
    lr = schedule("CosineAnnealingWarmRestarts", base_lr=1.0, t_0=4, t_mult=growth)
    assert [s for s in range(29) if lr(s) == 1.0][:4] == list(restarts)
    assert lr(2) == pytest.approx(0.5)
    assert lr(restarts[1] + 2 * growth) == pytest.approx(0.5)


def test_warm_up_ratio_wins_over_epochs_over_steps():
    ratio = schedule("constant_with_warmup", learning_rate=1.0, warmup_ratio=0.5, warmup_epochs=1, warmup_steps=10)
    epochs = schedule("constant_with_warmup", learning_rate=1.0, warmup_epochs=1, warmup_steps=10)
    assert (ratio(25), epochs(10), epochs(20)) == (0.5, 0.5, 1.0)


def test_total_steps_of_the_section_win_unless_minus_one():
    assert schedule("linear", learning_rate=1.0, total_steps=10)(5) == 0.5
    assert schedule("linear", learning_rate=1.0, total_steps=-1)(50) == 0.5


def test_rate_comes_from_the_optimizer_where_the_section_has_none():
    assert schedule("constant_with_warmup", optimizer_rate=3e-4)(0) == 3e-4
    assert build_schedule(None, SimpleNamespace(learning_rate=1e-5), 10, 10)(7) == 1e-5
    nested = SimpleNamespace(learning_rate=SimpleNamespace(type="linear", learning_rate=1.0))
    assert build_schedule(None, nested, 10, 10)(5) == 0.5


def test_every_alias_is_its_class():
    for alias, name in ALIASES.items():
        values = {"learning_rate": 0.1, "warmup_steps": 3}
        assert series(schedule(alias, **values), range(101)) == series(schedule(name, **values), range(101))


def test_no_schedule_leaves_its_range():
    for name in ALIASES.values():
        lr = schedule(name, total=37, learning_rate=0.1, warmup_ratio=0.1)
        assert all(0 <= lr(s) <= 0.1 and math.isfinite(lr(s)) for s in range(60)), name


@pytest.mark.parametrize(
    "kind, values, words",
    [
        ("CosinWithWarmUpLR", {"learning_rate": 1.0}, "CosinWithWarmUpLR"),
        ("LearningRateWiseLayer", {"learning_rate": 1.0}, "layer by layer"),
        ("cosine", {}, "learning_rate"),
        ("cosine", {"learning_rate": -1.0}, "negative"),
        ("cosine", {"learning_rate": 1.0, "warmup_ratio": 1.5}, "warmup_ratio"),
        ("cosine", {"learning_rate": 1.0, "warmup_steps": -1}, "warmup_steps"),
        ("cosine", {"learning_rate": 1.0, "total_steps": 0}, "total_steps"),
        ("CosineAnnealingLR", {"learning_rate": 1.0, "t_max": 0}, "t_max"),
    ],
)
def test_bad_settings_are_refused(kind, values, words):
    with pytest.raises(UserError, match=words):
        schedule(kind, **values)
