#!/usr/bin/env python
"""MMLU's and CMMLU's CSV files -> one JSON of Alpaca rows, for transform_dataset.py. docs/internlm.md has the flow.

python tools/dataset_preprocess/mmlu_csv2json.py --input mmlu/dev mmlu/val cmmlu/dev --output mmlu_alpaca_format.json
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_core.data.tool import run_tool  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Folders or files in, one JSON out."""
    parser = argparse.ArgumentParser(
        description="MMLU's and CMMLU's CSV files -> Alpaca's JSON.", allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True,
                        help="folders of CSV files, or files: MMLU's (no header) and CMMLU's (header) may be mixed")
    parser.add_argument("--output", type=Path, default=Path("mmlu_alpaca_format.json"),
                        help="JSON list of {instruction, input, output} (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Convert every question; the output appears under its name when it is whole."""
    arguments = parse_arguments()
    from llm_core.data.choices import choice_files, read_choice_file
    from llm_core.data.conversations import alpaca_of_choice
    from llm_core.data.inputs import write_whole
    from llm_core.report.console import console

    rows, subjects = [], set()
    for path in arguments.input:
        for file in choice_files(path) if path.is_dir() else [path]:
            questions = read_choice_file(file)
            rows += map(alpaca_of_choice, questions)
            subjects |= {question.subject for question in questions}
    write_whole(arguments.output, json.dumps(rows, ensure_ascii=False, indent=1).encode())
    console.result(f"{arguments.output}: {len(rows)} questions of {len(subjects)} subjects")


if __name__ == "__main__":
    sys.exit(run_tool(main))
