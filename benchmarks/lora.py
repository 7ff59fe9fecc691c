#!/usr/bin/env python3
"""A LoRA step: tokens/s and peak memory, against training all weights and against Hugging Face PEFT on torch, all fp32.

    python benchmarks/lora.py [--repetitions 3]
    python benchmarks/lora.py --models llama_16m    # one model; results are not written

lora_vs_full  our LoRA step against our step on all weights
lora_vs_peft  our LoRA step against PEFT's on transformers and torch (sdpa, fused AdamW on the adapter)

Rank 8, alpha 16 on the four projections of the attention, no dropout. Models, batches and steps are those of
train_step.py: a 15.7M Llama, batch 4 x 256, and a 135M Llama, batch 1 x 512 and 4 x 256; a ratio is the lowest of the
three. Two threads; a step goes from token ids to new weights, AdamW with weight decay 0.01. Every measurement is a
process of its own, the sides in turn. Reported is the median over the repetitions of tokens / median step time, and the
highest peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, train_step  # noqa: E402
from benchmarks.models import MODELS  # noqa: E402

SIDES = ("own_lora", "own_full", "peft")
SIZES = ("llama_16m", "llama_135m")
RANK, ALPHA = 8, 16
OURS, THEIRS = "wq|wk|wv|wo", ["q_proj", "k_proj", "v_proj", "o_proj"]
# figure -> the other side, and its name in the ratio's line
FIGURES = {"lora_vs_full": ("own_full", "all weights"), "lora_vs_peft": ("peft", "peft fp32")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=SIZES)
    parser.add_argument("--side", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.pin_threads()
        print(json.dumps(measure(*args.side)))
        return 0
    results = train_step.measure_in_turn(dict.fromkeys(args.models or SIZES, SIDES), args.repetitions)
    ratios = report(results)
    if not args.models:
        settings = {
            "shapes": {model: train_step.SHAPES[model] for model in SIZES},
            "steps": {model: train_step.STEPS[model] for model in SIZES},
            "models": {model: MODELS[model].settings() for model in SIZES},
            "lora": {"rank": RANK, "alpha": ALPHA, "target_modules": OURS},
        }
        common.write_result("lora", results, ratios, settings)
    return 0


def report(results: dict[str, dict[str, list[dict]]]) -> list[common.Ratio]:
    """Print every shape, and of each figure the ratio of the worst one, in speed and in memory."""
    speeds = {name: [] for name in FIGURES}
    memories = {name: [] for name in FIGURES}
    for model, sides in results.items():
        for shape in sides[SIDES[0]][0]:
            rates = {side: statistics.median(result[shape]["tokens_per_s"] for result in sides[side]) for side in SIDES}
            print(f"lora {model} {shape}: " + ", ".join(f"{side} {rates[side]:.0f}" for side in SIDES) + " tokens/s")
            for name, (peer, _) in FIGURES.items():
                speeds[name].append((rates["own_lora"] / rates[peer], rates["own_lora"], rates[peer]))
        peaks = {side: train_step.peak(results, model, side) for side in SIDES}
        print(f"lora {model} peak memory: " + ", ".join(f"{side} {peaks[side]:.0f}" for side in SIDES) + " MiB")
        for name, (peer, _) in FIGURES.items():
            memories[name].append((peaks[peer] / peaks["own_lora"], peaks["own_lora"], peaks[peer]))
    ratios = []
    for name, (_, peer) in FIGURES.items():
        for figure, rows, unit in ((name, speeds[name], "tokens/s"), (f"{name}_memory", memories[name], "MiB")):
            ratio, own, other = min(rows)
            ratios.append(common.ratio_line(figure, ratio, own, unit, peer, other))
    return ratios


# ----------------------------------------------------------------------------------------------------------- one side


def measure(model: str, side: str) -> dict[str, dict[str, Any]]:
    """"BxS" -> times of one side of one model."""
    length = max(length for _, length in train_step.SHAPES[model])
    if side == "peft":
        step = train_step.torch_step(model, "fp32", length, with_peft)
    else:
        step = train_step.own_step(model, "fp32", length, our_pet() if side == "own_lora" else None)
    return train_step.timed(step, model)


def our_pet() -> Any:
    """The pet_config of our side."""
    from llm_core.config.model_section import LoraConfig

    return LoraConfig(pet_type="lora", lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=OURS)


def with_peft(net: Any) -> Any:
    """The same on a model of transformers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=THEIRS, task_type="CAUSAL_LM")
    return get_peft_model(net, config)


if __name__ == "__main__":
    raise SystemExit(main())
