"""Make the golden files of the model's tests: what HF transformers computes for the tiny models of the tests.

    python tools/make_golden.py [llama falcon]   # writes tests/golden/*.npz; needs `make parity`

The weights are not stored: both sides make them by the same rule (tests/models/decoder_runs.py). For each case the
file holds the logits of every fourth position, the loss, 64 elements of every gradient and the greedy tokens.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]


def main(families: list[str]) -> None:
    """Compute every case of the families and write their files."""
    from decoder_runs import golden_of

    for family in families:
        cases = importlib.import_module(f"{family}_cases")
        arrays: dict[str, np.ndarray] = {}
        for name in cases.CASES:
            arrays |= golden_of(name, cases.hf_run(name))
        path = ROOT / "tests" / "golden" / f"{family}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)
        print(f"{path.relative_to(ROOT)}: {len(cases.CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama", "falcon"])
