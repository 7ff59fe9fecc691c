#!/usr/bin/env python3
"""Train step of a 15.7M Llama: tokens/s against HF transformers on torch (fp32, fused AdamW).

    python benchmarks/train_step.py [--repetitions 5]
    python benchmarks/train_step.py --flat       # 500 own steps: step time and resident memory stay flat

Both sides: 6 layers, 384 wide, 6 heads, 2 key/value heads, ffn 1024, vocabulary 8192, batch 4 x 256, AdamW with
weight decay 0.01, two threads, a step from token ids to new weights. Ours also takes the gradients' global norm,
as it does in every run. Reported is the median over the repetitions of tokens / median step time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402
from benchmarks.common import SHAPE  # noqa: E402

BATCH, LENGTH = 4, 256
WARM_STEPS, STEPS = 5, 20
FLAT_STEPS, SETTLED = 500, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--side", choices=("own", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.pin_threads()
        step = own_step() if args.side == "own" else peer_step()
        print(json.dumps(measure(step)))
        return 0
    if args.flat:
        common.pin_threads()
        return flat(own_step())
    own, peer = common.alternate(["--side", "own"], ["--side", "peer"], args.repetitions)
    own_rate = statistics.median(result["tokens_per_s"] for result in own)
    peer_rate = statistics.median(result["tokens_per_s"] for result in peer)
    line = common.ratio_line("train_step", own_rate / peer_rate, own_rate, "tokens/s", "transformers", peer_rate)
    settings = {"batch": BATCH, "seq_length": LENGTH, "steps": STEPS, "warm_steps": WARM_STEPS, **SHAPE}
    common.write_result("train_step", {"own": own, "peer": peer}, [line], settings)
    return 0


def measure(step) -> dict[str, float]:
    """Time STEPS calls after WARM_STEPS; the step returns when the weights are new."""
    times = []
    for index in range(WARM_STEPS + STEPS):
        begin = time.perf_counter()
        loss = step(index)
        if index >= WARM_STEPS:
            times.append(time.perf_counter() - begin)
    median = statistics.median(times)
    return {
        "tokens_per_s": BATCH * LENGTH / median,
        "step_ms": 1e3 * median,
        "slowest_ms": 1e3 * max(times),
        "last_loss": loss,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "step_ms_all": [round(1e3 * t, 2) for t in times],
    }


def token_ids(index: int):
    """int64 [BATCH, LENGTH + 1]; the same on both sides."""
    import numpy as np

    return np.random.default_rng(index).integers(3, SHAPE["vocab_size"], (BATCH, LENGTH + 1))


def own_step():
    """Our side: the step that every run takes."""
    from llm_core.runtime import prepare_environment

    prepare_environment(common.THREADS)
    import mindspore as ms
    import numpy as np

    from llm_core.models.decoder import CausalLM
    from llm_core.models.heads import TokenLoss
    from llm_core.train.optim import build_optimizer
    from llm_core.train.step import Stepper

    ms.set_context(mode=ms.GRAPH_MODE)
    spec = common.own_spec(LENGTH)
    net = CausalLM(spec, seed=0)
    optimizer = build_optimizer(SimpleNamespace(type="AdamW", weight_decay=0.01), net.trainable_params())
    stepper = Stepper(TokenLoss(net), optimizer, graph_key={"benchmark": "train_step", "spec": spec})

    def step(index: int) -> float:
        ids = token_ids(index).astype(np.int32)
        window = [(ids[:, :-1], ids[:, 1:])]
        return stepper.run(window, lr=1e-4, scale=1.0, update=index + 1, step=index).loss

    return step


def peer_step():
    """HF transformers' Llama with its default attention (sdpa), torch's fused AdamW."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(common.THREADS)
    torch.manual_seed(0)
    config = common.peer_config(LENGTH, use_cache=False)
    net = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step(index: int) -> float:
        ids = torch.from_numpy(token_ids(index))
        # shift_labels: HF then takes the labels as they are, so both sides have LENGTH of them a row
        labels = ids[:, 1:].contiguous()
        loss = net(input_ids=ids[:, :-1], labels=labels, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def flat(step) -> int:
    """FLAT_STEPS own steps: the last fifty against those after the SETTLED-th, in time and resident memory."""
    times, memory = [], []
    for index in range(FLAT_STEPS):
        begin = time.perf_counter()
        step(index)
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
