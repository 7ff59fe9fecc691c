"""The loss scale's state machine."""

from types import SimpleNamespace

import pytest

from llm_core.errors import UserError
from llm_core.train.loss_scale import LARGEST, build_loss_scale


def scale(sense):
    return build_loss_scale(SimpleNamespace(scale_sense=sense))


def section(kind, **values):
    return SimpleNamespace(type=f"{kind}LossScaleUpdateCell", **values)


def run(machine, overflows):
    values = []
    for overflow in overflows:
        machine.update(overflow)
        values.append(machine.value)
    return values


def test_a_number_is_a_fixed_scale():
    assert run(scale(1.0), [True, False]) == [1.0, 1.0]
    assert run(scale(section("Fixed", loss_scale_value=8)), [True]) == [8.0]
    assert build_loss_scale(None).value == 1.0


def test_dynamic_halves_at_overflow_and_doubles_after_a_clean_window():
    machine = scale(section("Dynamic", loss_scale_value=4, scale_factor=2, scale_window=3))
    assert run(machine, [False, False, True, False, False, False]) == [4, 4, 2, 2, 2, 4]


def test_dynamic_stays_between_one_and_what_fp32_holds():
    machine = scale(section("Dynamic", loss_scale_value=2, scale_factor=2, scale_window=1))
    assert run(machine, [True] * 3) == [1, 1, 1]
    assert run(machine, [False] * 200)[-1] == LARGEST


def test_adaptive_window_follows_the_run():
    machine = scale(section("Adaptive", loss_scale_value=2, scale_factor=2, scale_window=1,
                            min_scale_window=2, max_scale_window=5))
    run(machine, [False] * 3)
    assert machine.window == 2
    run(machine, [False] * 6)
    assert machine.window == 4
    run(machine, [False] * 12)
    assert machine.window == 5
    run(machine, [False] * 15)
    assert machine.window == 5
    run(machine, [True] * 3)
    assert machine.window == 1


@pytest.mark.parametrize("kind", ["Dynamic", "Adaptive"])
def test_restored_state_goes_on_alike(kind):
    history = ([False] * 7 + [True]) * 9
    values = {"loss_scale_value": 1024, "scale_window": 2, "max_scale_window": 64, "min_scale_window": 2}
    first, second = scale(section(kind, **values)), scale(section(kind, **values))
    run(first, history)
    second.load_state_dict(first.state_dict())
    assert run(first, history) == run(second, history)


@pytest.mark.parametrize(
    "sense, words",
    [
        (0.0, "above 0"),
        (section("Dynamic", scale_factor=1), "scale_factor"),
        (section("Adaptive", min_scale_window=9, max_scale_window=9), "max_scale_window"),
        (section("Dynamite"), "Dynamite"),
    ],
)
def test_bad_settings_are_refused(sense, words):
    with pytest.raises(UserError, match=words):
        scale(sense)
