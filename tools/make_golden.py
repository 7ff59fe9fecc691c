"""Make the golden files of the model's tests: what HF transformers computes for the tiny Llamas of the tests.

    python tools/make_golden.py            # writes tests/golden/llama.npz; needs `make parity` (torch, transformers)

The weights are not stored: both sides make them by the same rule (tests/models/llama_cases.py). For each case the
file holds the logits of every fourth position, the loss, 64 elements of every gradient and 64 greedy tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import llama_cases  # noqa: E402


def main() -> None:
    """Compute every case and write the file."""
    arrays: dict[str, np.ndarray] = {}
    for name in llama_cases.CASES:
        result = llama_cases.hf_run(name)
        arrays[f"{name}/logits"] = result.logits[:, ::4]
        arrays[f"{name}/loss"] = np.float64(result.loss)
        arrays[f"{name}/greedy"] = result.greedy.astype(np.uint8)
        arrays[f"{name}/gradients"] = llama_cases.sample(result.gradients)
    path = ROOT / "tests" / "golden" / "llama.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    print(f"{path.relative_to(ROOT)}: {len(llama_cases.CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
