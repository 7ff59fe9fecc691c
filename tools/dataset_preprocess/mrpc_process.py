#!/usr/bin/env python
"""MRPC (MSR's files, GLUE's tsv or jsonl) -> MindRecords of a sentence-pair classifier. docs/mrpc.md has the story.

python tools/dataset_preprocess/mrpc_process.py --input_file msr_paraphrase_train.txt --model_file tokenizer.json \\
    --output_file out/mrpc.mindrecord --valid_share 0.1 --test_share 0.1
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm_core.data.tool import run_tool  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """All flags are ours; --max_seq_len has the name and default of MindNLP's train_mrpc.py."""
    parser = argparse.ArgumentParser(description="MRPC -> MindRecords of token ids.", allow_abbrev=False)
    parser.add_argument("--input_file", type=Path, required=True,
                        help="msr_paraphrase_*.txt, GLUE's train.tsv or dev.tsv, or a .jsonl")
    parser.add_argument("--output_file", type=Path, required=True,
                        help="the MindRecord; NAME_valid and NAME_test are written beside it")
    parser.add_argument("--model_file", required=True,
                        help="tokenizer.model, tokenizer.json, or a folder that holds one")
    parser.add_argument("--max_seq_len", type=int, default=256, help="tokens a pair (default: %(default)s)")
    parser.add_argument("--valid_share", type=float, default=0.0,
                        help="share of the pairs for evaluation during training (default: %(default)s)")
    parser.add_argument("--test_share", type=float, default=0.0,
                        help="share kept for one evaluation at the end (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, help="processes (default: one a core); the output is the same")
    return parser.parse_args()


def main() -> None:
    """Check the flags, write the records of each part, say what was written."""
    arguments = parse_arguments()
    from llm_core.data.mrpc import Mrpc, read_pairs, split_pairs
    from llm_core.data.preprocess import preprocess, report
    from llm_core.errors import UserError

    shares = {"valid": arguments.valid_share, "test": arguments.test_share}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"--{name}_share {share}: must be 0 or more, and below 1")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: must be 0 or more")
    parts = split_pairs(read_pairs(arguments.input_file), shares, arguments.seed)
    output = arguments.output_file
    for part, pairs in parts.items():
        facts = {"part": part, "shares": shares, "split_seed": arguments.seed}
        data_set = Mrpc(arguments.input_file, pairs, arguments.max_seq_len, facts)
        name = output.name if part == "train" else f"{output.stem}_{part}{output.suffix}"
        workers = arguments.num_workers
        report(preprocess(data_set, output.with_name(name), arguments.model_file, num_workers=workers))


if __name__ == "__main__":
    sys.exit(run_tool(main))
