#!/usr/bin/env python3
"""Train steps: tokens/s and peak memory against HF transformers on torch (fused AdamW), fp32 and bfloat16 products.

    python benchmarks/train_step.py [--repetitions 3]
    python benchmarks/train_step.py --only train_step     # one figure; results are not written
    python benchmarks/train_step.py --flat                # 500 own steps: step time and resident memory stay flat

train_step         a 15.7M Llama, batch 4 x 256, fp32
train_step_135m    a 135M Llama of SmolLM's sizes, batch 1 x 512 and 4 x 256, fp32; the ratio is the lower of the two
train_step_falcon  a 15.4M Falcon (LayerNorm, erf-GELU, multi-query, parallel), batch 4 x 256, fp32
train_step_bf16    both Llamas with compute_dtype bfloat16 against torch in bfloat16: weights and all else in it, or
                   autocast over fp32 weights, whichever is faster. The ratio is the lowest of the three;
                   train_step_bf16_vs_fp32 is the same against torch in fp32.

Two threads; a step goes from token ids to new weights, AdamW with weight decay 0.01. Ours also takes the gradients'
global norm, as it does in every run. Every measurement is a process of its own, the sides in turn. Reported is the
median over the repetitions of tokens / median step time, and the highest peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402
from benchmarks.models import MODELS  # noqa: E402

# model -> batch sizes and lengths; warming steps and steps
SHAPES = {"llama_16m": ((4, 256),), "llama_135m": ((1, 512), (4, 256)), "falcon_16m": ((4, 256),)}
STEPS = {"llama_16m": (5, 15), "llama_135m": (2, 6), "falcon_16m": (5, 15)}
FP32, BF16 = ("own_fp32", "torch_fp32"), ("own_bf16", "torch_bf16", "torch_autocast")
# figure -> model -> sides
FIGURES = {
    "train_step": {"llama_16m": FP32},
    "train_step_135m": {"llama_135m": FP32},
    "train_step_falcon": {"falcon_16m": FP32},
    "train_step_bf16": {"llama_16m": FP32[1:] + BF16, "llama_135m": FP32[1:] + BF16},
}
FLAT_STEPS, SETTLED = 500, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=tuple(FIGURES))
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--side", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.pin_threads()
        print(json.dumps(measure(*args.side)))
        return 0
    if args.flat:
        common.pin_threads()
        return flat()
    figures = [args.only] if args.only else list(FIGURES)
    results = measure_in_turn(sides_of(figures), args.repetitions)
    ratios = [ratio for figure in figures for ratio in report(figure, results)]
    if not args.only:
        settings = {"shapes": SHAPES, "steps": STEPS, "models": {name: MODELS[name].settings() for name in SHAPES}}
        common.write_result("train_step", results, ratios, settings)
    return 0


def sides_of(figures: list[str]) -> dict[str, list[str]]:
    """model -> sides to measure; what several figures need is measured once."""
    wanted: dict[str, list[str]] = {}
    for figure in figures:
        for model, sides in FIGURES[figure].items():
            wanted.setdefault(model, []).extend(side for side in sides if side not in wanted[model])
    return wanted


def measure_in_turn(wanted: Mapping[str, Sequence[str]], repetitions: int) -> dict[str, dict[str, list[dict]]]:
    """model -> sides to measure, by the script that runs: model -> side -> a result a repetition."""
    results: dict[str, dict[str, list[dict]]] = {}
    for model, sides in wanted.items():
        results[model] = {side: [] for side in sides}
        for index in range(repetitions):
            for side in sides:
                found = common.run_side(["--side", model, side])
                results[model][side].append(found)
                text = ", ".join(f"{shape} {result['tokens_per_s']:.0f} tokens/s, {result['peak_rss_mib']:.0f} MiB"
                                 for shape, result in found.items())  # fmt: skip
                print(f"  {model} {index + 1}/{repetitions} {side}: {text}", file=sys.stderr, flush=True)
    return results


def rate(results: dict, model: str, side: str, shape: str) -> float:
    """Median tokens/s of one side."""
    return statistics.median(result[shape]["tokens_per_s"] for result in results[model][side])


def peak(results: dict, model: str, side: str) -> float:
    """Highest resident memory of one side over all its shapes, MiB."""
    return max(result["peak_rss_mib"] for found in results[model][side] for result in found.values())


def report(figure: str, results: dict) -> list[common.Ratio]:
    """Print a figure: all its shapes, the ratio of the slowest, memory."""
    lines, rows = [], []
    for model, sides in FIGURES[figure].items():
        own = next(side for side in sides if side.startswith("own"))
        for shape in results[model][own][0]:
            rates = {side: rate(results, model, side, shape) for side in sides}
            print(f"{figure} {model} {shape}: " + ", ".join(f"{side} {value:.0f}" for side, value in rates.items())
                  + " tokens/s")  # fmt: skip
            fp32 = rates.pop("torch_fp32") if own == "own_bf16" else None
            best = max((side for side in rates if side != own), key=lambda side: rates[side])
            rows.append((rates[own], best, rates[best], fp32))
        memory = {side: peak(results, model, side) for side in sides}
        print(f"{figure} {model} peak memory: "
              + ", ".join(f"{side} {value:.0f}" for side, value in memory.items()) + " MiB")  # fmt: skip
        if own == "own_fp32":
            lines.append((f"{figure}_memory", memory["torch_fp32"] / memory[own], memory[own], "MiB",
                          "transformers", memory["torch_fp32"]))  # fmt: skip
    own, best, other, _ = min(rows, key=lambda row: row[0] / row[2])
    lines.insert(0, (figure, own / other, own, "tokens/s", f"transformers {best.removeprefix('torch_')}", other))
    if rows[0][3]:
        own, _, _, other = min(rows, key=lambda row: row[0] / row[3])
        lines.append((f"{figure}_vs_fp32", own / other, own, "tokens/s", "transformers fp32", other))
    return [common.ratio_line(*line) for line in lines]


# ----------------------------------------------------------------------------------------------------------- one side


def measure(model: str, side: str) -> dict[str, dict[str, Any]]:
    """"BxS" -> times of one side of one model; the step returns when the weights are new."""
    whose, dtype = side.split("_")
    length = max(length for _, length in SHAPES[model])
    step = own_step(model, dtype, length) if whose == "own" else torch_step(model, dtype, length)
    return timed(step, model)


def timed(step: Callable[[Any, int], float], model: str) -> dict[str, dict[str, Any]]:
    """"BxS" -> times of a step on every shape of the model."""
    warm, count = STEPS[model]
    results = {}
    for batch, length in SHAPES[model]:
        times = []
        for index in range(warm + count):
            ids = token_ids(model, batch, length, index)
            begin = time.perf_counter()
            loss = step(ids, index)
            if index >= warm:
                times.append(time.perf_counter() - begin)
        median = statistics.median(times)
        results[f"{batch}x{length}"] = {
            "tokens_per_s": batch * length / median,
            "step_ms": 1e3 * median,
            "slowest_ms": 1e3 * max(times),
            "last_loss": loss,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "step_ms_all": [round(1e3 * t, 2) for t in times],
        }
    return results


def token_ids(model: str, batch: int, length: int, index: int) -> Any:
    """int64 [batch, length + 1]; the same on both sides."""
    import numpy as np

    return np.random.default_rng(index).integers(3, MODELS[model].vocab_size, (batch, length + 1))


def own_step(model: str, dtype: str, max_position: int, pet: Any = None) -> Callable[[Any, int], float]:
    """Our side: the step that every run takes. pet: a pet_config, None = all weights are trained."""
    from llm_core.runtime import prepare_environment

    prepare_environment(common.THREADS)
    import mindspore as ms
    import numpy as np

    from llm_core.models.heads import TokenLoss
    from llm_core.peft.apply import build_net
    from llm_core.train.optim import build_optimizer
    from llm_core.train.step import Stepper

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_recursion_limit(10000)  # context.max_call_depth of every run file; 30 layers need more than 1000
    spec = MODELS[model].spec(max_position, {"fp32": "float32", "bf16": "bfloat16"}[dtype])
    net = build_net(spec, pet, seed=0)
    optimizer = build_optimizer(SimpleNamespace(type="AdamW", weight_decay=0.01), net.trainable_params())
    stepper = Stepper(TokenLoss(net), optimizer, graph_key={"benchmark": "train_step", "spec": spec, "adapter": pet})

    def step(ids: Any, index: int) -> float:
        ids = ids.astype(np.int32)
        window = [(ids[:, :-1], ids[:, 1:])]
        return stepper.run(window, lr=1e-4, scale=1.0, update=index + 1, step=index).loss

    return step


def torch_step(
    model: str, dtype: str, max_position: int, adapted: Callable[[Any], Any] = lambda net: net
) -> Callable[[Any, int], float]:
    """HF transformers with its default attention (sdpa), torch's fused AdamW; dtype fp32 | bf16 | autocast.

    adapted: puts an adapter on the model.
    """
    import torch

    torch.set_num_threads(common.THREADS)
    torch.manual_seed(0)
    net = adapted(MODELS[model].hf(max_position, use_cache=False)).train()
    if dtype == "bf16":
        net = net.bfloat16()
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=0.01, fused=True)

    def step(ids: Any, index: int) -> float:
        ids = torch.from_numpy(ids)
        # shift_labels: HF then takes the labels as they are, so both sides have as many of them
        labels = ids[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            loss = net(input_ids=ids[:, :-1], labels=labels, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def flat(model: str = "llama_16m") -> int:
    """FLAT_STEPS own steps: the last fifty against those after the SETTLED-th, in time and resident memory."""
    ((batch, length),) = SHAPES[model]
    step = own_step(model, "fp32", length)
    times, memory = [], []
    for index in range(FLAT_STEPS):
        ids = token_ids(model, batch, length, index)
        begin = time.perf_counter()
        step(ids, index)
        times.append(time.perf_counter() - begin)
        memory.append(resident_mib())
        if index % 50 == 49:
            recent = statistics.median(times[-50:])
            print(f"  step {index + 1}: {1e3 * recent:.0f} ms, {memory[-1]:.0f} MiB", file=sys.stderr, flush=True)
    early, late = statistics.median(times[SETTLED : SETTLED + 50]), statistics.median(times[-50:])
    growth = memory[-1] - memory[SETTLED]
    ratio = common.ratio_line("train_step_flat", early / late, 1e3 * late, "ms/step", "early steps", 1e3 * early)
    print(f"resident memory: {memory[SETTLED]:.0f} MiB after step {SETTLED}, {growth:+.1f} MiB at step {FLAT_STEPS}")
    repetition = {"step_ms_all": [round(1e3 * t, 2) for t in times], "rss_mib": [round(m, 1) for m in memory]}
    common.write_result("train_step_flat", [repetition], [ratio], {"steps": FLAT_STEPS, "rss_growth_mib": growth})
    return 0


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
