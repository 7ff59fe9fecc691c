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


@pytest.mark.parametrize(("family", "name"), CASES)
def test_golden(family, name, golden):
    ours = FAMILIES[family].run(name)
    compare_golden(ours, golden[family], name)
    np.testing.assert_array_equal(ours.greedy, golden[family][f"{name}/greedy"])


@pytest.mark.parity
@pytest.mark.parametrize(("family", "name"), CASES)
def test_live(family, name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ours, theirs = FAMILIES[family].run(name), FAMILIES[family].hf_run(name)
    compare(ours, theirs)
    np.testing.assert_array_equal(ours.greedy, theirs.greedy)
