#!/usr/bin/env python
"""Text or conversations -> MindRecord of token ids. docs/data.md has the whole story.

python tools/dataset_preprocess/llama_preprocess.py --dataset_type wiki --input_glob 'wikitext-2/wiki.train.tokens' \\
    --model_file tokenizer.model --seq_length 2048 --output_file out/wiki2048.mindrecord
python tools/dataset_preprocess/llama_preprocess.py --dataset_type qa --input_glob alpaca-data-conversation.json \\
    --model_file tokenizer.model --seq_length 2048 --output_file out/alpaca2048.mindrecord
python tools/dataset_preprocess/llama_preprocess.py --input_glob chats.jsonl --chat_template tokenizer \\
    --model_file model_folder/ --seq_length 2048 --output_file out/chats2048.mindrecord
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_core.data.tool import run_tool  # noqa: E402

TEXTS = ("wiki", "text", "jsonl")
CONVERSATIONS = ("qa", "sharegpt", "messages", "alpaca", "src_tgt", "oasst1")


def parse_arguments() -> argparse.Namespace:
    """MindFormers' flags; --tokenizer_type, --chat_template, --long_rows and --num_workers are ours."""
    parser = argparse.ArgumentParser(
        description="Text or conversations -> MindRecord of token ids.", allow_abbrev=False
    )
    parser.add_argument("--dataset_type", choices=["auto", *TEXTS, *CONVERSATIONS], default="auto",
                        help="text: wiki, text (paragraphs as they are), jsonl ({\"text\"}); conversations: qa = "
                             "sharegpt, messages, alpaca, src_tgt, oasst1; default: told from the first row")
    parser.add_argument("--input_glob", required=True, help="a file, or a quoted pattern for several")
    parser.add_argument("--output_file", type=Path, default=Path("dataset/wiki2048/wiki2048.mindrecord"),
                        help="the MindRecord (default: %(default)s)")
    parser.add_argument("--model_file", help="tokenizer.model, tokenizer.json, a folder that holds one, or a name")
    parser.add_argument("--tokenizer_type", help="the same as --model_file")
    parser.add_argument("--chat_template", "--format", default="vicuna_v1.1",
                        help="how a conversation is written: a fastchat template, internlm, none, tokenizer (the "
                             "template in its folder), or a path to a folder, a Jinja or a JSON file "
                             "(default: %(default)s)")
    parser.add_argument("--seq_length", type=int, default=2048, help="records hold one id more (default: 2048)")
    parser.add_argument("--long_rows", choices=["cut", "drop"], default="cut",
                        help="conversations that are longer: cut at the end, or left out (default: %(default)s)")
    parser.add_argument("--file_partition", type=int, default=1, help="number of MindRecord files (shards)")
    parser.add_argument("--repeat", type=int, default=1, help="write the whole data so many times")
    parser.add_argument("--samples_num", type=int, help="accepted for MindFormers' commands; all rows are written")
    parser.add_argument("--num_workers", type=int, help="processes (default: one a core); the output is the same")
    return parser.parse_args()


def main() -> None:
    """Check the flags, write the records, say what was written."""
    arguments = parse_arguments()
    from llm_core.data.inputs import find_inputs
    from llm_core.data.preprocess import preprocess, report, require_positive
    from llm_core.errors import UserError
    from llm_core.report.console import console

    tokenizer = arguments.model_file or arguments.tokenizer_type
    if not tokenizer:
        raise UserError("no tokenizer: give --model_file (or --tokenizer_type) a tokenizer file, its folder, or a name")
    if arguments.samples_num is not None:
        console.info("--samples_num has no effect (nor has it for MindFormers' wiki and qa): all rows are written")
    require_positive(seq_length=arguments.seq_length)
    data_set = open_data_set(arguments, find_inputs(arguments.input_glob), tokenizer)
    report(preprocess(data_set, arguments.output_file, tokenizer, repeat=arguments.repeat,
                      num_shards=arguments.file_partition, num_workers=arguments.num_workers))


def open_data_set(arguments: argparse.Namespace, inputs: list[Path], tokenizer: str):
    """The DataSet that --dataset_type names, or that the files' first rows tell."""
    from llm_core.data.detect import detect_one_format
    from llm_core.data.plain import PlainText
    from llm_core.data.qa import Conversations, located_template
    from llm_core.data.wiki import WikiText
    from llm_core.report.console import console

    kind = arguments.dataset_type
    if kind == "auto":
        kind = detect_one_format(inputs)
        console.info(f"--dataset_type {kind}, told from {inputs[0]}")
    if kind == "wiki":
        return WikiText(inputs, arguments.seq_length)
    if kind in TEXTS:
        return PlainText(inputs, arguments.seq_length, kind)
    template = located_template(arguments.chat_template, tokenizer)
    drop_long = arguments.long_rows == "drop"
    return Conversations(inputs, arguments.seq_length, template, "sharegpt" if kind == "qa" else kind, drop_long)


if __name__ == "__main__":
    sys.exit(run_tool(main))
