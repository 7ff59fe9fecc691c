#!/usr/bin/env python
"""Weights between Hugging Face's (or Meta's) form and MindFormers', without torch.

python tools/convert_weight.py --model llama --input_path HF_FOLDER --output_path llama.safetensors --dtype fp32
python tools/convert_weight.py --model llama --input_path llama.safetensors --output_path HF_FOLDER --reversed
python tools/convert_weight.py --model falcon --input_path HF_FOLDER --output_path falcon.ckpt
python tools/convert_weight.py --model llama --input_path model.gguf --output_path HF_FOLDER
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_core.checkpoint.convert import to_hugging_face, to_mindformers  # noqa: E402
from llm_core.checkpoint.dtypes import FLAG_NAMES  # noqa: E402
from llm_core.checkpoint.files import WRITABLE  # noqa: E402
from llm_core.config.hf_keys import FAMILIES  # noqa: E402
from llm_core.data.tool import run_tool  # noqa: E402
from llm_core.report.console import console  # noqa: E402

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _flag(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _is_gguf_to_folder(source: str, target: str) -> bool:
    """Whether a GGUF file is to become a Hugging Face folder: where no file to write is named."""
    return source.endswith(".gguf") and Path(target).suffix not in WRITABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert weights between Hugging Face's (or Meta's) form and MindFormers'.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", choices=tuple(FAMILIES), required=True,
        help="the family of the weights, by the model_type of Hugging Face's config.json (Yi is a llama)",
    )  # fmt: skip
    parser.add_argument(
        "--input_path", required=True,
        help="a Hugging Face folder or one of its files (safetensors, .bin), Meta's folder, a .gguf file, or a "
        "MindFormers .safetensors, .ckpt or output folder",
    )  # fmt: skip
    parser.add_argument(
        "--output_path", required=True,
        help=".safetensors or .ckpt file; a new folder with --reversed, or for a .gguf (tokenizer included)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=FLAG_NAMES, help="type of the written weights (default: as they are)")
    parser.add_argument("--reversed", action="store_true", help="from MindFormers' form to Hugging Face's")
    parser.add_argument(
        "--qkv_concat", type=_flag, nargs="?", const=True, default=False,
        help="join wq, wk, wv and w1, w3, as a model with qkv_concat: True wants them",
    )  # fmt: skip
    parser.add_argument("--config", help="with --reversed: the model's YAML, or a config.json")
    parser.add_argument(
        "--max_shard_size", type=_size, default="5GB", metavar="SIZE", help="with --reversed: size of a file (5GB)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion; returns the exit code."""
    parser = _parser()
    flags = parser.parse_args(argv)
    to_folder = flags.reversed or _is_gguf_to_folder(flags.input_path, flags.output_path)
    if to_folder and flags.qkv_concat:
        parser.error("--qkv_concat: a Hugging Face folder has no joined projections; leave it out")
    return run_tool(lambda: console.info(f"written: {convert(flags, to_folder)}"), stopped=None)


def convert(flags: argparse.Namespace, to_folder: bool) -> Path:
    """What the flags ask for; returns the file or the folder that was written."""
    if to_folder:
        return to_hugging_face(
            flags.input_path, flags.output_path, flags.dtype, flags.config, flags.max_shard_size, flags.model
        )
    return to_mindformers(flags.input_path, flags.output_path, flags.dtype, flags.qkv_concat, flags.model)


if __name__ == "__main__":
    sys.exit(main())
