"""The decoder against HF's models: logits, loss, gradients and greedy tokens of every tiny model of the families.

From golden files always, live where torch is installed.
"""

from __future__ import annotations

from pathlib import Path

import falcon_cases
import llama_cases
import numpy as np
import pytest
from decoder_runs import compare, compare_golden

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = {"llama": llama_cases, "falcon": falcon_cases}
CASES = [(family, name) for family, cases in FAMILIES.items() for name in cases.CASES]


@pytest.fixture(scope="module")
def golden():
    return {family: np.load(GOLDEN / f"{family}.npz") for family in FAMILIES}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> tuple[str, str]:
    """A family and one of its tiny models."""
    return request.param


@pytest.fixture(scope="module")
def ours(case):
    """Our results, for both tests of a case: compiling is what takes the time."""
    family, name = case
    return FAMILIES[family].run(name)


def test_golden(case, ours, golden):
    family, name = case
    compare_golden(ours, golden[family], name)
    np.testing.assert_array_equal(ours.greedy, golden[family][f"{name}/greedy"])


@pytest.mark.parity
def test_live(case, ours):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    family, name = case
    theirs = FAMILIES[family].hf_run(name)
    compare(ours, theirs)
    np.testing.assert_array_equal(ours.greedy, theirs.greedy)
