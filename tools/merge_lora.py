#!/usr/bin/env python
"""A LoRA adapter merged into its base model: one weight file that needs no adapter any more.

python tools/merge_lora.py --adapter_id output --output_path merged.safetensors
python tools/merge_lora.py --load_checkpoint BASE --adapter_id ADAPTER --config RUN.yaml --output_path merged.ckpt
python tools/merge_lora.py --src_ckpt_path_or_dir FOLDER --dst_ckpt_dir MERGED --config RUN.yaml    # MindFormers' flags
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_core.data.tool import run_tool  # noqa: E402
from llm_core.errors import UserError  # noqa: E402
from llm_core.report.console import console  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Merge a LoRA adapter into its base: in float32, with the scaling that the adapter (or --config) "
        "says, and only if the logits stay the same.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--load_checkpoint",
        help="the base: whatever run_llm.py takes (default: what the adapter was trained on, else the config's)",
    )
    parser.add_argument(
        "--adapter_id",
        help="the adapter: a run's output folder, a checkpoint, a Hugging Face PEFT folder, or a name in adapters/ "
        "beside the base (default: the config's, or the one that lies with the base)",
    )
    parser.add_argument(
        "--config",
        help="the run's YAML, or the base's Hugging Face folder (default: what the adapter's run or the base keeps)",
    )
    parser.add_argument("--output_path", help="the merged .safetensors or .ckpt file")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="its type (default: fp32)")
    parser.add_argument(
        "--no_compare", action="store_true",
        help="do not compare logits; without it both models are built, one after the other, in float32",
    )  # fmt: skip
    upstream = parser.add_argument_group("MindFormers' names (transform_ckpt_lora.py)")
    upstream.add_argument("--src_ckpt_path_or_dir", help="as --load_checkpoint; holds base and adapter together")
    upstream.add_argument("--dst_ckpt_dir", help="folder: the merged weights are its rank_0/PREFIX0.ckpt")
    upstream.add_argument("--prefix", default="checkpoint_", help="of that file's name (default: checkpoint_)")
    upstream.add_argument(
        "--lora_scaling", type=float, help="alpha / rank; only checked, because the adapter or --config says it"
    )
    upstream.add_argument("--src_ckpt_strategy", default="", help="must be empty, see tools/transform_ckpt.py")
    upstream.add_argument("--dst_ckpt_strategy", default="", help="must be empty, likewise")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the merge; returns the exit code."""
    parser = _parser()
    flags = parser.parse_args(argv)
    if bool(flags.output_path) == bool(flags.dst_ckpt_dir):
        parser.error("name the merged file with --output_path, or its folder with --dst_ckpt_dir")
    if flags.load_checkpoint and flags.src_ckpt_path_or_dir:
        parser.error("--load_checkpoint and --src_ckpt_path_or_dir are two names of one thing; give one of them")
    if flags.src_ckpt_strategy or flags.dst_ckpt_strategy:
        parser.error("--src_ckpt_strategy, --dst_ckpt_strategy: checkpoints of our runs are read whole; for others, "
                     "and for a layout of the merged file, use tools/transform_ckpt.py before and after")  # fmt: skip
    return run_tool(lambda: console.info(merge(flags)), stopped=None)


def merge(flags: argparse.Namespace) -> str:
    """What the flags ask for; returns a line that says what was done."""
    from llm_core.peft import adapters, lora
    from llm_core.peft.run_facts import run_facts

    base = flags.load_checkpoint or flags.src_ckpt_path_or_dir
    facts = run_facts(flags.config, (flags.adapter_id, base))
    beside = base or facts.load_checkpoint
    adapter_id = flags.adapter_id or facts.adapter_id
    if not adapter_id and not beside:
        raise UserError("--adapter_id: name the adapter, or with --load_checkpoint what holds base and adapter")
    source = adapters.find_adapter(adapter_id, beside) if adapter_id else adapters.adapter_in(beside) or Path(beside)
    wanted = facts.pet if flags.config else None
    adapter = adapters.read_adapter(source, facts.spec, wanted)
    base = base or (adapter.base if adapter_id else "") or facts.load_checkpoint
    if not base:
        raise UserError(f"--load_checkpoint: {source} does not say what it was trained on; name its base's weights")
    console.info(adapter.line())
    if adapter.pet.pet_type != "lora":
        raise UserError(f"{source}: only LoRA can be merged; {adapter.pet.pet_type} has no weights of the base's shape")
    scaling = lora.scaling(adapter.pet)
    if flags.lora_scaling is not None and not math.isclose(flags.lora_scaling, scaling, rel_tol=1e-6):
        raise UserError(
            f"--lora_scaling {flags.lora_scaling:g}: {source} was trained with {scaling:g} "
            f"(lora_alpha {adapter.pet.lora_alpha:g}, lora_rank {adapter.pet.lora_rank}); leave the flag out"
        )
    target = flags.output_path or str(Path(flags.dst_ckpt_dir) / "rank_0" / f"{flags.prefix}0.ckpt")
    if not flags.no_compare:
        _start_mindspore(facts.config)
    from llm_core.peft.merge import merge_files

    return merge_files(facts.spec, base, adapter, target, flags.dtype, compare=not flags.no_compare).line()


def _start_mindspore(config) -> None:
    from llm_core import runtime

    if config is not None:
        runtime.start(config)
        return
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU", max_call_depth=10000)


if __name__ == "__main__":
    sys.exit(main())
