#!/usr/bin/env python3
"""Greedy generation with a 15.7M Llama: new tokens/s against HF transformers' `generate` on torch.

    python benchmarks/decode.py [--repetitions 3]

Both sides: 6 layers, 384 wide, 6 heads, 2 key/value heads, ffn 1024, vocabulary 8192, fp32, the same weights and
prompts, two threads. A call reads prompts and writes 128 tokens a row (no token ends a text), so the time to read the
prompts is part of the figure. A repetition is a process of its own: warmed up, then the median of a few calls, of

    decode_b1, decode_b8    128 tokens read, at batch 1 and batch 8
    decode_2048             1920 tokens read, at batch 1 (decode_2048_b1) and batch 8 (decode_2048_b8); the ratio is
                            the lower of the two

Reported is the median over the repetitions. Both sides must write the same tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402
from benchmarks.models import MODELS  # noqa: E402

MODEL = MODELS["llama_16m"]
NEW = 128
# figure -> batch, tokens of a prompt, warming calls, calls
FIGURES = {
    "decode_b1": (1, 128, 2, 5),
    "decode_b8": (8, 128, 2, 5),
    "decode_2048_b1": (1, 1920, 1, 3),
    "decode_2048_b8": (8, 1920, 1, 3),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--side", choices=("own", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        common.pin_threads()
        print(json.dumps(measure(own_generate(args.weights) if args.side == "own" else peer_generate(args.weights))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        write_weights(weights)
        sides = [["--side", side, "--weights", str(weights)] for side in ("own", "peer")]
        own, peer = common.alternate(*sides, args.repetitions)
    for result in own + peer:
        if result["tokens"] != own[0]["tokens"]:
            raise SystemExit("decode: the two sides did not write the same tokens")
    lines = []
    for name in FIGURES:
        own_rate, peer_rate = (statistics.median(result[name] for result in side) for side in (own, peer))
        lines.append(common.ratio_line(name, own_rate / peer_rate, own_rate, "tokens/s", "hf", peer_rate))
    lowest = min(lines[2:], key=lambda line: line.ratio)
    lines.append(common.ratio_line("decode_2048", lowest.ratio, lowest.own, "tokens/s", "hf", lowest.peer_value))
    settings = {"new_tokens": NEW, "batch_prompt_warm_calls": FIGURES, **MODEL.settings()}
    common.write_result("decode", {"own": own, "peer": peer}, lines, settings)
    return 0


def measure(generate: Callable[[list[list[int]]], list[list[int]]]) -> dict[str, Any]:
    """New tokens/s of each figure, the seconds of every call, and a digest of the tokens."""
    import hashlib

    result: dict[str, Any] = {"tokens": {}, "seconds": {}}
    for name, (batch, length, warm, calls) in FIGURES.items():
        prompts = prompt_ids(batch, length)
        times = []
        for call in range(warm + calls):
            begin = time.perf_counter()
            answers = generate(prompts)
            if call >= warm:
                times.append(time.perf_counter() - begin)
        result[name] = batch * NEW / statistics.median(times)
        result["seconds"][name] = [round(seconds, 4) for seconds in times]
        result["tokens"][name] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
    return result


def prompt_ids(batch: int, length: int) -> list[list[int]]:
    """`batch` prompts of `length` ids, the same on both sides."""
    import numpy as np

    return np.random.default_rng(batch).integers(3, MODEL.vocab_size, (batch, length)).tolist()


def write_weights(path: Path) -> None:
    """Random weights under Hugging Face's names; wide enough that no two tokens are ever about equally likely."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    hidden, ffn = MODEL.hidden_size, MODEL.ffn_size
    kv = hidden // MODEL.num_heads * MODEL.num_kv_heads
    shapes = {"model.embed_tokens": (MODEL.vocab_size, hidden), "lm_head": (MODEL.vocab_size, hidden)}
    for layer in range(MODEL.num_layers):
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (ffn, hidden)),
            ("mlp.up_proj", (ffn, hidden)),
            ("mlp.down_proj", (hidden, ffn)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm"] = (hidden,)
    weights = {
        f"{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else random.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, path)


def own_generate(weights: Path) -> Callable[[list[list[int]]], list[list[int]]]:
    """Our side: the Generator that predict and chat use."""
    from llm_core.runtime import prepare_environment

    prepare_environment(common.THREADS)
    import mindspore as ms

    from llm_core.checkpoint.weights import load_into, read_weights
    from llm_core.infer.generate import Generator
    from llm_core.infer.sampling import SamplingParams
    from llm_core.models.decoder import CausalLM

    ms.set_context(mode=ms.GRAPH_MODE)
    spec = MODEL.spec(longest())
    net = CausalLM(spec, seed=None)
    load_into(net, read_weights(weights))
    generator = Generator(net, spec, eos_ids=[], pad_id=0)
    params = SamplingParams(max_new_tokens=NEW)
    return lambda prompts: [answer.token_ids for answer in generator.generate(prompts, params)]


def peer_generate(weights: Path) -> Callable[[list[list[int]]], list[list[int]]]:
    """HF transformers: Llama with its default attention (sdpa) and cache, greedy."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(common.THREADS)
    net = MODEL.hf(longest(), bos_token_id=None, eos_token_id=None).eval()
    net.load_state_dict(load_file(weights))

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        written = net.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
        return written[:, ids.shape[1] :].tolist()

    return generate


def longest() -> int:
    """Positions that the model must have."""
    return max(length for _, length, _, _ in FIGURES.values()) + NEW


if __name__ == "__main__":
    raise SystemExit(main())
