#!/usr/bin/env python
"""Stanford Alpaca's JSON -> the conversations that `llama_preprocess.py --dataset_type qa` reads.

python tools/dataset_preprocess/alpaca_converter.py --data_path alpaca_data.json \\
    --output_path alpaca-data-conversation.json
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_core.data.tool import run_tool  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """MindFormers' flags."""
    parser = argparse.ArgumentParser(description="Alpaca's JSON -> conversations.", allow_abbrev=False)
    parser.add_argument("--data_path", type=Path, default=Path("alpaca-data.json"),
                        help="JSON list of {instruction, input, output} (default: %(default)s)")
    parser.add_argument("--output_path", type=Path, default=Path("alpaca-data-conversation.json"),
                        help="the conversations (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Convert every row; the output appears under its name when it is whole."""
    arguments = parse_arguments()
    from llm_core.data.conversations import alpaca_to_conversation
    from llm_core.data.inputs import read_rows, write_whole
    from llm_core.report.console import console

    rows = read_rows(arguments.data_path)
    conversations = [
        alpaca_to_conversation(row, number + 1, rows.place(number)) for number, row in enumerate(rows.values)
    ]
    write_whole(arguments.output_path, json.dumps(conversations, ensure_ascii=False, indent=2).encode())
    console.result(f"{arguments.output_path}: {len(conversations)} conversations")


if __name__ == "__main__":
    sys.exit(run_tool(main))
