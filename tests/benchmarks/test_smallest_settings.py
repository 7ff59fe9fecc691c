"""Every benchmark at its smallest, so that a change of what it measures cannot break it unseen.

Each runs in a process of its own, as it does in `make bench`; those with torch on the other side need it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import lora, train_step  # noqa: E402

TINY = "dict(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, ffn_size=32)"


def run(code: str) -> str:
    """What the code prints; `sys` and `replace` (of dataclasses) are imported."""
    code = "import sys; sys.path.insert(0, '.')\nfrom dataclasses import replace\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parity
def test_attention():
    """Also that both sides compute the same, which the benchmark checks itself."""
    pytest.importorskip("torch")
    arguments = "['x', '--lengths', '64', '--dims', '64', '--threads', '1', '--only'"
    printed = run(
        "from benchmarks import attention as b\n"
        "b.BUDGET = 0; b.PACKED_LENGTH, b.DOCUMENT = 128, (20, 30)\n"
        f"for part in ('sdpa', 'varlen', 'error'): sys.argv = {arguments}, part]; assert b.main() == 0"
    )
    for figure in ("fwd_causal_fp32", "bwd_causal_fp32", "fwd_full_fp32", "bwd_full_fp32", "varlen", "error_fp32"):
        assert f"ratio attention_{figure} " in printed
    assert "measured FMA peak: fp32 1 thread(s)" in printed


def test_attention_in_mindspore():
    printed = run("from benchmarks import attention_mindspore as b\nb.BUDGET = 0\nprint(b.measure([32]))")
    rows = eval(printed.splitlines()[-1])
    assert [row["pass"] for row in rows] == ["fwd", "fwd+bwd"]
    assert all(row["ms"]["own"] > 0 and row["ms"]["naive"] > 0 for row in rows)


def test_picture_of_attention(tmp_path):
    run(
        "from itertools import product\nfrom pathlib import Path\nfrom benchmarks import attention as b\n"
        "values = product(b.TOLERANCE, (True, False), b.PASSES, b.LENGTHS, b.DIMS)\n"
        "names = ('dtype', 'causal', 'pass', 'length', 'dim')\n"
        "more = {'threads': 2, 'of_peak': {'own': 0.7, 'torch': 0.4}}\n"
        "points = [dict(zip(names, point)) | more for point in values]\n"
        f"b.picture(points, Path({str(tmp_path)!r}) / 'a.png')"
    )
    assert 10_000 < (tmp_path / "a.png").stat().st_size < 100_000


@pytest.mark.parity
def test_operators():
    """All of them, own against torch; MindSpore's side is a process that takes longer, so two of its Cells do."""
    pytest.importorskip("torch")
    printed = run(
        "from benchmarks import operators as b\n"
        "from benchmarks.operator_sides import OPERATORS, mindspore_calls\n"
        "has_bf16 = b.kernels().isa == 'avx512_bf16'\n"
        "for name, problem in OPERATORS.items():\n"
        "    if has_bf16 or not name.endswith('_bf16'): b.check(name, problem(32)); print(name)\n"
        "for name in ('adamw', 'swiglu'): [call() for call in mindspore_calls(name, 32).values()]"
    )
    assert {"cross_entropy", "adamw", "rope", "gelu", "embedding_gradient"} <= set(printed.split())


def test_own_train_steps():
    printed = run(
        "from benchmarks import train_step as b\n"
        f"tiny = {TINY}\n"
        "for model in ('llama_16m', 'falcon_16m'):\n"
        "    b.MODELS[model] = replace(b.MODELS[model], num_kv_heads=1, **tiny)\n"
        "    step = b.own_step(model, 'fp32', 8)\n"
        "    print(step(b.token_ids(model, 2, 8, 0), 0), step(b.token_ids(model, 2, 8, 1), 1))\n"
    )
    losses = [float(loss) for loss in printed.split()]
    assert len(losses) == 4 and all(3 < loss < 6 for loss in losses)  # ln 64 = 4.16


@pytest.mark.parity
def test_train_steps_of_torch():
    pytest.importorskip("transformers")
    printed = run(
        "from benchmarks import train_step as b\n"
        f"tiny = {TINY}\n"
        "for model, dtype in (('llama_16m', 'fp32'), ('llama_16m', 'bf16'), ('llama_16m', 'autocast'),\n"
        "                     ('falcon_16m', 'fp32')):\n"
        "    b.MODELS[model] = replace(b.MODELS[model], num_kv_heads=1, **tiny)\n"
        "    step = b.torch_step(model, dtype, 8)\n"
        "    print(step(b.token_ids(model, 2, 8, 0), 0), step(b.token_ids(model, 2, 8, 1), 1))\n"
    )
    losses = [float(loss) for loss in printed.split()]
    assert len(losses) == 8 and all(3 < loss < 6 for loss in losses)


def test_own_lora_steps():
    printed = run(
        "from benchmarks import lora, train_step as b\n"
        f"b.MODELS['llama_16m'] = replace(b.MODELS['llama_16m'], num_kv_heads=1, **{TINY})\n"
        "step = b.own_step('llama_16m', 'fp32', 8, lora.our_pet())\n"
        "print(step(b.token_ids('llama_16m', 2, 8, 0), 0), step(b.token_ids('llama_16m', 2, 8, 1), 1))\n"
    )
    losses = [float(loss) for loss in printed.split()]
    assert len(losses) == 2 and all(3 < loss < 6 for loss in losses)  # ln 64 = 4.16


@pytest.mark.parity
def test_lora_steps_of_peft():
    pytest.importorskip("peft")
    printed = run(
        "from benchmarks import lora, train_step as b\n"
        f"b.MODELS['llama_16m'] = replace(b.MODELS['llama_16m'], num_kv_heads=1, **{TINY})\n"
        "b.SHAPES['llama_16m'], b.STEPS['llama_16m'] = ((2, 8),), (1, 1)\n"
        "print(lora.measure('llama_16m', 'peft')['2x8']['last_loss'])\n"
    )
    assert 3 < float(printed.splitlines()[-1]) < 6


def test_lora_is_reported_by_its_worst_shape(capsys):
    def result(rates: dict[str, float], memory: float) -> list[dict]:
        return [{shape: {"tokens_per_s": rate, "peak_rss_mib": memory} for shape, rate in rates.items()}]

    results = {
        "llama_16m": {"own_lora": result({"4x256": 300}, 50), "own_full": result({"4x256": 200}, 90),
                      "peft": result({"4x256": 100}, 60)},
        "llama_135m": {"own_lora": result({"1x512": 30, "4x256": 28}, 50), "own_full":
                       result({"1x512": 20, "4x256": 20}, 100), "peft": result({"1x512": 15, "4x256": 10}, 75)},
    }  # fmt: skip
    ratios = {ratio.name: ratio.ratio for ratio in lora.report(results)}
    assert ratios == {"lora_vs_full": 1.4, "lora_vs_full_memory": 1.8, "lora_vs_peft": 2.0, "lora_vs_peft_memory": 1.2}
    assert "ratio lora_vs_full 1.400 (own 28 tokens/s, all weights 20 tokens/s)" in capsys.readouterr().out


@pytest.mark.parametrize("name, parameters", [("llama_16m", 15.73e6), ("llama_135m", 134.5e6), ("falcon_16m", 15.43e6)])
def test_models_have_the_size_of_their_name(name, parameters):
    assert train_step.MODELS[name].spec(256).num_parameters == pytest.approx(parameters, rel=1e-3)


def test_a_figure_of_several_shapes_is_the_lowest_of_them(capsys):
    def result(rates: dict[str, float], memory: float) -> list[dict]:
        return [{shape: {"tokens_per_s": rate, "peak_rss_mib": memory} for shape, rate in rates.items()}]

    results = {
        "llama_16m": {"own_bf16": result({"4x256": 300}, 5), "torch_fp32": result({"4x256": 120}, 9),
                      "torch_bf16": result({"4x256": 200}, 4), "torch_autocast": result({"4x256": 100}, 6)},
        "llama_135m": {"own_fp32": result({"1x512": 30, "4x256": 28}, 50), "torch_fp32":
                       result({"1x512": 20, "4x256": 20}, 100), "own_bf16": result({"1x512": 60, "4x256": 60}, 50),
                       "torch_bf16": result({"1x512": 30, "4x256": 20}, 30),
                       "torch_autocast": result({"1x512": 40, "4x256": 50}, 60)},
    }  # fmt: skip
    ratios = {ratio.name: ratio for ratio in train_step.report("train_step_135m", results)}
    assert ratios["train_step_135m"].ratio == 1.4 and ratios["train_step_135m_memory"].ratio == 2
    ratios = {ratio.name: ratio for ratio in train_step.report("train_step_bf16", results)}
    assert ratios["train_step_bf16"].ratio == 1.2 and ratios["train_step_bf16"].peer == "transformers autocast"
    assert ratios["train_step_bf16_vs_fp32"].ratio == 2.5
    assert "train_step_bf16 llama_135m 4x256: torch_fp32 20, own_bf16 60" in capsys.readouterr().out


@pytest.mark.parity
def test_decoding_writes_the_same_tokens_on_both_sides(tmp_path):
    pytest.importorskip("transformers")
    printed = run(
        "from pathlib import Path\nfrom benchmarks import decode as b\n"
        f"b.MODEL = replace(b.MODEL, num_kv_heads=1, **{TINY})\n"
        "b.FIGURES, b.NEW = {'decode_b1': (1, 5, 0, 1), 'decode_b8': (3, 5, 0, 1)}, 6\n"
        f"weights = Path({str(tmp_path)!r}) / 'weights.safetensors'\n"
        "b.write_weights(weights)\n"
        "own, peer = (b.measure(side(weights)) for side in (b.own_generate, b.peer_generate))\n"
        "assert own['tokens'] == peer['tokens'], (own, peer)\n"
        "print(own['decode_b8'])"
    )
    assert float(printed.splitlines()[-1]) > 0
