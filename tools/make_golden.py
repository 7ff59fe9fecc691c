"""Make the golden files of the model's tests: what HF transformers computes for the tiny models of the tests.

    python tools/make_golden.py [llama falcon]   # writes tests/golden/*.npz; needs `make parity`
    PYTHON tools/make_golden.py generation       # group, contrastive and constrained search: needs transformers 4.55.4

The weights are not stored: both sides make them by the same rule (tests/models/decoder_runs.py). For each case the
file holds the logits of every fourth position, the loss, 64 elements of every gradient and the greedy tokens.

transformers 4.57 has given three searches away to code that it downloads; 4.55.4 is the last that has all of them. It
does not go with the tests' own version, so PYTHON is one of an environment of its own, outside the repository:

    python -m venv ~/hf455 && ~/hf455/bin/pip install torch==2.13.0 transformers==4.55.4 pydantic pyyaml
    ~/hf455/bin/python tools/make_golden.py generation
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models"), str(ROOT / "tests" / "infer")]


def main(families: list[str]) -> None:
    """Compute every case of the families and write their files."""
    for family in families:
        cases = importlib.import_module(f"{family}_cases")
        arrays = dict(cases.hf_golden() if family == "generation" else _model_arrays(cases))
        path = ROOT / "tests" / "golden" / f"{family}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)
        print(f"{path.relative_to(ROOT)}: {len(arrays)} arrays, {path.stat().st_size} bytes")


def _model_arrays(cases: ModuleType) -> Iterator[tuple[str, np.ndarray]]:
    from decoder_runs import golden_of

    for name in cases.CASES:
        yield from golden_of(name, cases.hf_run(name)).items()


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama", "falcon"])
