"""Every layout gives one process's losses and weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from layout_cases import COVERING, MATRIX, STEPS, Case, final_weights, held_elements, launch, losses, write_records

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import write_result  # noqa: E402

TOLERANCE = 1e-5  # relative, of losses and of every weight


def run_all(folder: Path, cases: list[Case]) -> dict[str, str]:
    """Run the cases and the plain runs that they are held against; a case's name -> what is wrong, "" if nothing is."""
    records = write_records(folder)
    plain = list(dict.fromkeys(case.plain() for case in cases))
    for world in sorted({case.world for case in [*plain, *cases]}):
        mine = [case for case in [*plain, *cases] if case.world == world]
        codes = launch(folder, world, [case.write(folder, records) for case in mine])
        assert len(codes[0]) == len(mine)
        failed = [case.name for i, case in enumerate(mine) if any(rank[i] for rank in codes)]
        assert not failed, failed
    return {case.name: difference(folder, case) for case in cases}


def difference(folder: Path, case: Case) -> str:
    """What is not as in the plain run."""
    ours, plain = losses(folder, case), losses(folder, case.plain())
    if ours.shape != plain.shape or len(ours) != STEPS:
        return f"{len(ours)} steps, and {len(plain)}"
    worst = np.abs(ours[:, 0] / plain[:, 0] - 1).max()
    if worst > TOLERANCE:
        return f"losses differ by {worst:.1e}"
    held, wanted = final_weights(folder, case), final_weights(folder, case.plain())
    if held.keys() != wanted.keys():
        return f"other weights: {sorted(held.keys() ^ wanted.keys())[:3]}"
    # Without rotary positions a bias of the keys adds the same to all scores of a query: its gradient is rounding
    # alone, of which Adam makes steps.
    named = {name: x for name, x in wanted.items() if x.any() and not (case.has_alibi and name.endswith("wk.bias"))}
    off = {name: np.linalg.norm(held[name] - x) / np.linalg.norm(x) for name, x in named.items()}
    name = max(off, key=off.get)
    return f"{name} differs by {off[name]:.1e}" if off[name] > TOLERANCE else ""


@pytest.mark.slow
def test_a_covering_set_of_layouts_gives_one_processes_numbers(tmp_path):
    wrong = {name: what for name, what in run_all(tmp_path, COVERING).items() if what}
    assert not wrong
    # 32 wide, 4 layers, 2 of 4 heads for keys, 48 wide feed-forward, 96 ids; vectors are the norms
    matrices, vectors = 4 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 2 * 96 * 32, 9 * 32
    whole = matrices + vectors
    half, quarter = (matrices // ranks + vectors for ranks in (2, 4))
    held = {  # of layouts of a Llama whose weights are all trained: parameters, and state, which is twice as much
        Case(dp=2): (whole, 2 * whole),
        Case(dp=2, zero=3): (half, 2 * half),
        # the embedding is whole under tp, and every rank has one of the two key/value heads, which two ranks share
        Case(tp=4): ((n := 4 * (32 * 8 * 2 + 32 * 8 * 2 + 3 * 32 * 12) + 96 * 8 * 4 + 24 * 32 + vectors), 2 * n),
    }
    for case, counts in held.items():
        assert held_elements(tmp_path, case, 0) == counts, case.name


@pytest.mark.matrix
@pytest.mark.skipif("RUN_MATRIX" not in os.environ, reason="an hour: make test-matrix")
def test_every_layout_family_and_tuning_gives_one_processes_numbers(tmp_path):
    found = run_all(tmp_path, MATRIX)
    results = {name: what or "equal" for name, what in sorted(found.items())}
    write_result("parallel_matrix", results, [], {"steps": STEPS, "relative_tolerance": TOLERANCE})
    assert not any(found.values())
