#!/usr/bin/env python
"""SQuAD 1.1 -> MindRecord for training or for EM/F1 evaluation. docs/data.md has the whole story.

python tools/dataset_preprocess/squad_data_process.py --input_file dev-v1.1.json --mode eval --max_length 2048 \\
    --tokenizer_type tokenizer.model --output_file out/squad_eval.mindrecord
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_core.data.tool import run_tool  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """MindFormers' flags; --model_file, --all_questions and --num_workers are ours."""
    parser = argparse.ArgumentParser(description="SQuAD 1.1 -> MindRecord of token ids.", allow_abbrev=False)
    parser.add_argument("--input_file", type=Path, default=Path("squad/train-v1.1.json"),
                        help="a JSON file of SQuAD 1.1 (default: %(default)s)")
    parser.add_argument("--output_file", type=Path, default=Path("squad/recode_train.mindrecord"),
                        help="the MindRecord (default: %(default)s)")
    parser.add_argument("--mode", choices=["train", "eval"], default="train",
                        help="train: prompt and answer, max_length + 1 ids; eval: the prompt, max_length ids")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens a sample (default: %(default)s)")
    parser.add_argument("--tokenizer_type", default="llama_7b",
                        help="tokenizer.model, tokenizer.json, a folder that holds one, or a name (%(default)s)")
    parser.add_argument("--model_file", help="the same as --tokenizer_type")
    parser.add_argument("--all_questions", action="store_true",
                        help="all questions of a paragraph, not its first alone (MindFormers' way)")
    parser.add_argument("--num_workers", type=int, help="processes (default: one a core); the output is the same")
    return parser.parse_args()


def main() -> None:
    """Check the flags, write the records, say what was written."""
    arguments = parse_arguments()
    from llm_core.data.preprocess import preprocess, report, require_positive
    from llm_core.data.squad import Squad

    require_positive(max_length=arguments.max_length)
    data_set = Squad(arguments.input_file, arguments.max_length, arguments.mode, arguments.all_questions)
    tokenizer = arguments.model_file or arguments.tokenizer_type
    report(preprocess(data_set, arguments.output_file, tokenizer, num_workers=arguments.num_workers))


if __name__ == "__main__":
    sys.exit(run_tool(main))
