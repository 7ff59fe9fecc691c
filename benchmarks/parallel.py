#!/usr/bin/env python3
"""Data parallel training against one process: tokens/s of whole runs, started as a user starts them.

    python benchmarks/parallel.py [--repetitions 3]

dp2_vs_one     two ranks of one thread against one process of two threads, global batch 32 x 256 by accumulation
zero1_vs_dp2   the same two ranks with the optimizer's state shared out (ZeRO 1) against without

A 15.7M Llama, AdamW, fp32. A micro-batch holds 4 x 256 tokens on every side, so one process accumulates 8 and a rank
4 of them, and gradients are exchanged once a step. At 4 x 256, a step without accumulation, the exchange weighs most:
that figure is printed and saved too. Reported is the median over the repetitions of tokens / median step time, from the
runs' own metrics.jsonl; the first two steps are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402
from benchmarks.models import MODELS  # noqa: E402

LENGTH, WARM = 256, 2
# global batch -> steps, and side -> (ranks, ZeRO stage, rows a rank and micro-batch, micro-batches)
SHAPES = {
    32: (8, {"one": (1, 0, 4, 8), "dp2": (2, 0, 4, 4), "zero1": (2, 1, 4, 4)}),
    4: (22, {"one": (1, 0, 4, 1), "dp2": (2, 0, 2, 1), "zero1": (2, 1, 2, 1)}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    count = parser.parse_args().repetitions
    repetitions: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        records = write_records(Path(folder))
        for index in range(count):
            found = {}
            for batch, (_, sides) in SHAPES.items():
                for side in sides:
                    found[f"{side} {batch}x{LENGTH}"] = result = run(Path(folder), records, batch, side, index)
                    brief = f"{result['tokens_per_s']:.0f} tokens/s"
                    print(f"  {index + 1}/{count} {side} {batch} x {LENGTH}: {brief}", file=sys.stderr, flush=True)
            repetitions.append(found)

    def median(side: str, batch: int) -> float:
        return statistics.median(found[f"{side} {batch}x{LENGTH}"]["tokens_per_s"] for found in repetitions)

    for batch in SHAPES:
        figures = ", ".join(f"{side} {median(side, batch):.0f}" for side in SHAPES[batch][1])
        print(f"{batch} x {LENGTH}: {figures} tokens/s")
    ratios = []
    for name, own, peer in (("dp2_vs_one", "dp2", "one"), ("zero1_vs_dp2", "zero1", "dp2")):
        values = median(own, 32), median(peer, 32)
        ratios.append(common.ratio_line(name, values[0] / values[1], values[0], "tokens/s", peer, values[1]))
    settings = {"model": MODELS["llama_16m"].settings(), "length": LENGTH, "warming_steps": WARM, "shapes": SHAPES}
    common.write_result("parallel", repetitions, ratios, settings)
    return 0


def write_records(folder: Path) -> Path:
    """Random token ids, enough for every run."""
    import numpy as np

    from llm_core.data.records import RecordWriter

    path = folder / "tokens.mindrecord"
    rows = max(batch * steps for batch, (steps, _) in SHAPES.items())
    ids = np.random.default_rng(0).integers(3, MODELS["llama_16m"].vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    with RecordWriter(path, columns={"input_ids": LENGTH + 1}, manifest={}) as writer:
        writer.write_rows({"input_ids": ids})
    return path


def run(folder: Path, records: Path, batch: int, side: str, index: int) -> dict[str, Any]:
    """One run of a side: its speed, and every step's time."""
    steps, sides = SHAPES[batch]
    ranks, zero, rows, micro_batches = sides[side]
    output = folder / f"{side}_{batch}_{index}"
    words = [
        "--config", str(write_config(folder)), "--train_dataset_dir", str(records), "--output_dir", str(output),
        "--batch_size", str(rows), "--gradient_accumulation_steps", str(micro_batches),
        "--runner_config.stop_step", str(steps), "--use_parallel", str(ranks > 1), "--dp", str(ranks),
        "--parallel.zero_stage", str(zero),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": str(common.THREADS // ranks)}
    if ranks == 1:
        command = [sys.executable, str(common.ROOT / "run_llm.py"), *words]
    else:
        job = " ".join([str(common.ROOT / "run_llm.py"), *words])
        command = ["bash", str(common.ROOT / "scripts/msrun_launcher.sh"), job, str(ranks)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    times = [line["step_ms"] for line in lines if "step_ms" in line][WARM:]
    tokens = batch * LENGTH
    return {"tokens_per_s": 1e3 * tokens / statistics.median(times), "step_ms_all": [round(ms, 1) for ms in times]}


def write_config(folder: Path) -> Path:
    """The run file that all sides share."""
    import yaml

    model = MODELS["llama_16m"]
    config = {
        "seed": 1, "run_mode": "train", "use_parallel": False,
        "runner_config": {"epochs": 1, "sink_mode": False},
        "optimizer": {"type": "AdamW", "weight_decay": 0.01},
        "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-4, "warmup_steps": 0},
        "train_dataset": {"data_loader": {"type": "MindDataset", "shuffle": False}, "input_columns": ["input_ids"]},
        "runner_wrapper": {"type": "MFTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True},
        "callbacks": [{"type": "MFLossMonitor"}],
        "context": {"mode": 0, "device_target": "CPU"},
        "model": {
            "arch": {"type": "LlamaForCausalLM"},
            "model_config": {
                "type": "LlamaConfig", "seq_length": LENGTH, "vocab_size": model.vocab_size,
                "hidden_size": model.hidden_size, "num_layers": model.num_layers, "num_heads": model.num_heads,
                "n_kv_heads": model.num_kv_heads, "intermediate_size": model.ffn_size, "pad_token_id": 0,
            },
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
