#!/usr/bin/env python
"""Instructions in Alpaca's JSON -> MindRecord in InternLM's chat form. docs/internlm.md has the whole flow.

python tools/dataset_preprocess/transform_dataset.py --input alpaca_format.json --output mindrecord/ --num_shards 4 \\
    --model_file internlm/tokenizer.model
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_core.data.tool import run_tool  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Input, output and shards; --model_file and --seq_length are those of llama_preprocess.py."""
    parser = argparse.ArgumentParser(
        description="Instructions in Alpaca's JSON -> MindRecord in InternLM's chat form.", allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="JSON or JSONL of {instruction, input, output}, or a pattern")
    parser.add_argument("--output", required=True,
                        help="a folder (with a slash at its end, or one that exists), or the MindRecord's name")
    parser.add_argument("--num_shards", type=int, default=1, help="number of MindRecord files")
    parser.add_argument("--model_file", default="internlm",
                        help="tokenizer.model, its folder, or a name (default: %(default)s)")
    parser.add_argument("--seq_length", type=int, default=2048, help="records hold one id more (default: 2048)")
    parser.add_argument("--chat_template", "--format", default="internlm",
                        help="how a conversation is written; see llama_preprocess.py (default: %(default)s)")
    parser.add_argument("--long_rows", choices=["cut", "drop"], default="drop",
                        help="rows that are longer: cut at the end, or left out (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, help="processes (default: one a core); the output is the same")
    return parser.parse_args()


def main() -> None:
    """Check the flags, write the records, say what was written."""
    arguments = parse_arguments()
    from llm_core.data.inputs import find_inputs
    from llm_core.data.preprocess import preprocess, report, require_positive
    from llm_core.data.qa import Conversations, located_template
    from llm_core.errors import UserError
    from llm_core.text.lookup import find_tokenizer_file

    require_positive(num_shards=arguments.num_shards, seq_length=arguments.seq_length)
    inputs = find_inputs(arguments.input, "--input")
    try:
        tokenizer = find_tokenizer_file(arguments.model_file)
    except UserError as error:
        raise UserError(f"--model_file {error}") from None
    template = located_template(arguments.chat_template, tokenizer)
    data_set = Conversations(inputs, arguments.seq_length, template, "alpaca", arguments.long_rows == "drop")
    output = Path(arguments.output)
    if arguments.output.endswith("/") or output.is_dir():
        output = output / f"{inputs[0].stem}.mindrecord"
    report(preprocess(data_set, output, tokenizer, num_shards=arguments.num_shards,
                      num_workers=arguments.num_workers))


if __name__ == "__main__":
    sys.exit(run_tool(main))
