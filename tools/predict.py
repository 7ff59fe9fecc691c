#!/usr/bin/env python
"""Answer the prompts of a JSON file; the answers as a numpy array, and readable beside it. docs/internlm.md.

python tools/predict.py --config_path configs/internlm/predict_internlm_7b_mmlu.yaml --input_file test.json \\
    --output_file results.npy --load_checkpoint merged.safetensors --processor.tokenizer.vocab_file tokenizer.model

The input is a list of strings, or of Alpaca's rows {"instruction", "input"}. results.npy is an array of strings, one a
prompt (`numpy.load("results.npy")`); results.npy.json holds the prompts with their answers. Further flags are those of
run_llm.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Run `run_llm.py --run_mode predict` with --save_file; returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Answer the prompts of a JSON file. Further flags are those of run_llm.py.", allow_abbrev=False
    )
    parser.add_argument("--config_path", required=True, help="a run file, or the name of a packaged run")
    parser.add_argument("--input_file", required=True, help="JSON: a list of prompts, or of Alpaca's rows")
    parser.add_argument("--output_file", default="results.npy", help="where the answers go (default: %(default)s)")
    arguments, others = parser.parse_known_args()
    if not Path(arguments.input_file).is_file():
        print(f"--input_file {arguments.input_file}: no such file", file=sys.stderr)
        return 2
    from llm_core.cli import main as run

    return run([
        "--config", arguments.config_path, "--run_mode", "predict", "--predict_data", arguments.input_file,
        "--save_file", arguments.output_file, *others,
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
