#!/usr/bin/env python
"""LoRA adapters between Hugging Face PEFT's folders and MindFormers' names, without peft or torch.

python tools/convert_adapter.py --input_path PEFT_FOLDER --output_path adapter.safetensors --config RUN.yaml
python tools/convert_adapter.py --input_path output --output_path PEFT_FOLDER --base_model HF_FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_core.data.tool import run_tool  # noqa: E402
from llm_core.errors import UserError  # noqa: E402
from llm_core.report.console import console  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert a LoRA adapter: a PEFT folder into a file of ours, anything else of ours into a PEFT "
        "folder.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input_path", required=True,
        help="a PEFT folder (adapter_config.json); or a run's output folder or checkpoint that holds an adapter",
    )  # fmt: skip
    parser.add_argument(
        "--output_path", required=True, help="a .safetensors or .ckpt file; for a PEFT folder a new folder"
    )
    parser.add_argument(
        "--config",
        help="the model: a run's YAML, or the base's Hugging Face folder (default: what the run or --base_model keeps)",
    )
    parser.add_argument(
        "--base_model", help="what a PEFT folder names as its base (default: what the adapter was trained on)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion; returns the exit code."""
    flags = _parser().parse_args(argv)
    return run_tool(lambda: console.info(convert(flags)), stopped=None)


def convert(flags: argparse.Namespace) -> str:
    """What the flags ask for; returns a line that says what was written."""
    from llm_core.peft import hf_adapter
    from llm_core.peft.adapters import describe, read_adapter
    from llm_core.peft.run_facts import run_facts

    source, target = Path(flags.input_path).expanduser(), Path(flags.output_path).expanduser()
    from_peft = hf_adapter.is_hf_adapter(source)
    base_of_folder = hf_adapter.read_adapter_config(source).get("base_model_name_or_path") if from_peft else None
    facts = run_facts(flags.config, (flags.input_path, flags.base_model, base_of_folder))
    adapter = read_adapter(source, facts.spec, facts.pet if flags.config and not from_peft else None)
    base = flags.base_model or adapter.base or base_of_folder or facts.load_checkpoint
    if from_peft:
        hf_adapter.write_our_file(target, adapter.pet, adapter.tensors, base or "")
    else:
        if adapter.pet.pet_type != "lora":
            raise UserError(f"{source}: only LoRA can be written for PEFT, and this is {adapter.pet.pet_type}")
        if not base:
            raise UserError("--base_model: the adapter does not say what it was trained on; name its base model")
        hf_adapter.write_adapter(target, adapter.pet, adapter.tensors, facts.spec, str(base))
    return f"written: {target}: {describe(adapter.pet)}"


if __name__ == "__main__":
    sys.exit(main())
