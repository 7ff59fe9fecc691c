#!/usr/bin/env python
"""A checkpoint of one parallel layout as one of another, or as one file: weights, optimizer state, adapters.

python tools/transform_ckpt.py --src_ckpt_dir output --dst_ckpt_dir whole
python tools/transform_ckpt.py --src_ckpt_dir output --dst_ckpt_dir out_tp4 --mp 4 --format safetensors
python tools/transform_ckpt.py --src_ckpt_dir output --dst_ckpt_dir out_as_run --config RUN.yaml
python tools/transform_ckpt.py --src_ckpt_strategy SRC --dst_ckpt_strategy DST --src_ckpt_dir A --dst_ckpt_dir B
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_core.data.tool import run_tool  # noqa: E402
from llm_core.errors import UserError  # noqa: E402
from llm_core.report.console import console  # noqa: E402

if TYPE_CHECKING:
    from llm_core.checkpoint.strategy import Strategy
    from llm_core.checkpoint.transform import Target
    from llm_core.checkpoint.weights import WeightFiles
    from llm_core.config import RunConfig
    from llm_core.parallel.layout import Layout

_SIZES = {"dp": "data_parallel", "mp": "model_parallel", "pp": "pipeline_stage", "zero_stage": "zero_stage"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint of one parallel layout as one of another; without a target's layout, as one "
        "file. The files become DST/rank_N/PREFIXN.ckpt. Bit by bit, a tensor's part at a time.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--src_ckpt_dir", required=True,
        help="a run's output folder, a checkpoint of it, or a folder with rank_0, rank_1 ...; one process's files too",
    )  # fmt: skip
    parser.add_argument(
        "--dst_ckpt_dir", required=True, help="the folder that gets rank_0, rank_1 ...; another than the source's"
    )
    parser.add_argument("--prefix", default="checkpoint_", help="of the files' names (default: checkpoint_)")
    parser.add_argument("--format", choices=("ckpt", "safetensors"), default="ckpt", help="their kind (default: ckpt)")
    target = parser.add_argument_group("the target's layout, by a run file or its sizes")
    target.add_argument("--config", help="a run's YAML: its model and layout (default: the model of the source's run)")
    for flag, key in _SIZES.items():
        target.add_argument(f"--{flag}", type=int, metavar="N", help=f"{key} of the target")
    upstream = parser.add_argument_group("MindSpore's strategy files (a file, merged or not, or a folder of them)")
    upstream.add_argument(
        "--src_ckpt_strategy", default="", help="of the source; files of our runs say themselves what they hold"
    )
    upstream.add_argument("--dst_ckpt_strategy", default="", help="of the target")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the transformation; returns the exit code."""
    parser = _parser()
    flags = parser.parse_args(argv)
    sizes = [f"--{flag}" for flag in _SIZES if getattr(flags, flag) is not None]
    if flags.dst_ckpt_strategy and (sizes or flags.config):
        parser.error(f"--dst_ckpt_strategy says the target's layout; leave {', '.join(sizes or ['--config'])} out")
    return run_tool(lambda: console.info(run(flags)), stopped=None)


def run(flags: argparse.Namespace) -> str:
    """What the flags ask for; returns a line that says what was done."""
    from llm_core.checkpoint.transform import transform
    from llm_core.checkpoint.weights import open_weights

    _require_said(flags)
    source = open_weights(flags.src_ckpt_dir, flags.src_ckpt_strategy)
    try:
        target, what = _target(flags, source)
        paths = transform(source, target, flags.dst_ckpt_dir, flags.prefix, f".{flags.format}")
        count = len(source)
    finally:
        source.close()
    return f"{flags.src_ckpt_dir} -> {what}: {count} tensors, {len(paths)} files, the first of them {paths[0]}"


def _require_said(flags: argparse.Namespace) -> None:
    """UserError for files of several ranks that do not say which part each of them is."""
    from llm_core.checkpoint.locate import weight_files
    from llm_core.checkpoint.reshard import shards_of

    first = weight_files(flags.src_ckpt_dir)[0].absolute()
    beside = first.parent.name == "rank_0" and first.parent.with_name("rank_1").is_dir()
    if beside and not flags.src_ckpt_strategy and shards_of(first) is None:
        raise UserError(
            f"--src_ckpt_strategy: {first.parent.parent} holds files of several ranks without manifests, which do not "
            "say what each of them holds: name the strategy file of their run, or the folder of such files"
        )


def _target(flags: argparse.Namespace, source: WeightFiles) -> tuple[Target | Strategy, str]:
    """Who holds what afterwards, and a few words for it."""
    from llm_core.checkpoint.reshard import Share
    from llm_core.checkpoint.state_names import is_state
    from llm_core.checkpoint.strategy import read_strategy
    from llm_core.checkpoint.transform import LayoutTarget, OneFile
    from llm_core.parallel.cuts import cut_parameters
    from llm_core.peft.apply import is_adapter_name

    if flags.dst_ckpt_strategy:
        strategy = read_strategy(flags.dst_ckpt_strategy)
        return strategy, f"the {strategy.ranks} ranks of {flags.dst_ckpt_strategy}"
    facts = None
    if flags.config or any(getattr(flags, flag) is not None for flag in _SIZES):
        from llm_core.peft.run_facts import run_facts

        facts = run_facts(flags.config, (flags.src_ckpt_dir,))
    layout = _layout(flags, None if facts is None else facts.config)
    if facts is None or layout.world == 1:
        return OneFile(), "one process"
    adapter = {
        name: head.shape for name, head in source.heads.items() if is_adapter_name(name) and not is_state(name, source)
    }
    cuts = cut_parameters(facts.spec, layout, adapter)
    return LayoutTarget([Share(layout, rank, cuts) for rank in range(layout.world)]), layout.describe()


def _layout(flags: argparse.Namespace, config: RunConfig | None) -> Layout:
    """The run file's, with the sizes that the flags give; without a run file named, theirs alone."""
    from llm_core.parallel.layout import Layout, layout_from_config

    layout = layout_from_config(config) if flags.config and config is not None else Layout()
    given = {"dp": flags.dp, "tp": flags.mp, "pp": flags.pp, "zero": flags.zero_stage}
    given = {name: size for name, size in given.items() if size is not None}
    wrong = [f"{name} {size}" for name, size in given.items() if size < (name != "zero")]
    if wrong or given.get("zero", 0) > 3:
        raise UserError(f"the target's layout: {', '.join(wrong) or '--zero_stage is 0, 1, 2 or 3'}: no such size")
    layout = replace(layout, **given)
    return replace(layout, zero=layout.zero if layout.dp > 1 else 0)


if __name__ == "__main__":
    sys.exit(main())
