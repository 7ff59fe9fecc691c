"""The benchmark of the CUDA kernels where no GPU is: its refusal, arithmetic, figures, attention in fp64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import attention_oracle as oracle  # noqa: E402

from benchmarks import common, cuda_attention, cuda_figures, cuda_sides, run  # noqa: E402


def point(what: str, rate: dict[str, float], **fields) -> dict:
    return {"what": what, "rate": rate, "errors": {}, **fields}


def test_without_a_gpu_one_line_says_why(monkeypatch, capsys):
    monkeypatch.setattr(cuda_sides, "refusal", lambda: "there is no GPU")
    monkeypatch.setattr(sys, "argv", ["cuda_attention.py"])
    assert cuda_attention.main() == common.UNAVAILABLE
    assert capsys.readouterr() == ("", "cuda_attention: nothing measured: there is no GPU\n")


def test_the_reason_is_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cuda_sides.refusal() == "torch is not installed (make parity)"


@pytest.mark.parity
def test_a_torch_without_gpu_is_named():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cuda_sides.refusal() == f"torch {torch.__version__} sees no GPU with CUDA"


@pytest.mark.parametrize("arguments", [["--only", "fp8"], ["--lengths"], ["--dims", "x"]])
def test_wrong_arguments_are_refused(arguments):
    script = ROOT / "benchmarks" / "cuda_attention.py"
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and arguments[0] in done.stderr


@pytest.mark.parametrize("asked, code", [([], 0), (["cuda_attention"], 1)])
def test_make_bench_leaves_it_out_without_a_gpu(monkeypatch, asked, code):
    """But who asks for it by name is told that it was not measured."""
    monkeypatch.setattr(run, "BENCHMARKS", ("cuda_attention",))
    monkeypatch.setattr(run, "run", lambda script: (common.UNAVAILABLE, []))
    monkeypatch.setattr(sys, "argv", ["run.py", *asked])
    assert run.main() == code


def test_operations_of_counted_pairs():
    assert cuda_figures.pairs([3], causal=False) == 9 and cuda_figures.pairs([3, 1], causal=True) == 7
    assert cuda_figures.teraflops("forward", 2, 64, 10**9, 0.5) == pytest.approx(4 * 2 * 64 * 1e9 / 5e-4 / 1e12)
    assert cuda_figures.teraflops("backward", 1, 1, 10**9, 10) == 1


@pytest.mark.parametrize("mean", cuda_attention.MEANS)
def test_documents_fill_the_row(mean):
    lengths = cuda_figures.documents(mean, cuda_attention.PACKED)
    assert sum(lengths) == cuda_attention.PACKED and len(lengths) == cuda_attention.PACKED // mean
    assert len(set(lengths)) > 4 and mean // 2 <= min(lengths) and max(lengths) <= 3 * mean // 2


def test_a_figure_is_its_lowest_shape_against_the_best_peer(capsys):
    points = [point("a", {"own": 90, "flash": 100, "cudnn": 60}), point("b", {"own": 50, "flash": 40, "cudnn": 100}),
              point("without peers", {"own": 1}), point("without own", {"flash": 1000})]
    [ratio] = cuda_figures.lowest("x", points, "own", ["flash", "cudnn"], "TFLOP/s")
    assert ratio.ratio == 0.5 and ratio.peer == "cudnn"
    assert capsys.readouterr().out == ("ratio x 0.500 (own 50 TFLOP/s, cudnn 100 TFLOP/s)\n"
                                       "  lowest of 2, at b; highest 0.90\n")
    assert cuda_figures.lowest("x", points, "hopper", ["flash"], "TFLOP/s") == []


def test_errors_are_compared_with_the_first_peer_that_is_there(capsys):
    points = [{"what": "a", "errors": {"out": {"own": 1.0, "unfused": 2.0, "efficient": 0.1}}},
              {"what": "b", "errors": {"dq": {"own": 2.0, "tf32": 4.0, "efficient": 3.0}}}, {"length": 1}]
    [ratio] = cuda_figures.error_ratio(points)
    assert (ratio.own, ratio.peer, ratio.peer_value, ratio.ratio) == (4.0, "efficient", 3.0, 0.75)
    assert "lowest of 3, at b dq, tf32" in capsys.readouterr().out


def test_every_figure_of_the_tables(capsys):
    """Those of fp32 are of D 64 from S 1024 on, those of bf16 of D 128, causal."""
    def table(name: str, dim: int, length: int, **rate: float) -> dict:
        return point(f"{name} {dim}", rate, dim=dim, causal=True, length=length, **{"pass": name})

    measured = {
        "fp32": [table("forward", 64, 512, own=1, unfused=9, rows=1), table("forward", 64, 1024, own=4, unfused=2),
                 table("forward", 128, 1024, own=1, unfused=9, tf32=6, efficient=3)],
        "bf16": [table("forward", 64, 2048, own=1, flash=9), table("backward", 128, 2048, own=3, flash=4),
                 table("forward", 128, 2048, own=8, flash=10, hopper=9, cudnn=12)],
        "varlen": [point("long", {"own": 9, "dense": 10}, mean=2048), point("short", {"own": 1, "dense": 9}, mean=512)],
        "decode": [point("d", {"own": 3, "paged": 2, "torch": 1, "flash": 2})],
        "memory": [{"length": 10, "per_token": 8.0}, {"length": 20, "per_token": 4.0}],
    }
    ratios = {ratio.name: ratio.ratio for ratio in cuda_figures.figures(measured)}
    assert ratios == {
        "cuda_fp32_vs_unfused": 2, "cuda_fp32_vs_rows": 1, "cuda_tf32_vs_efficient": 2,
        "cuda_bf16_forward_vs_flash": 0.8, "cuda_bf16_backward_vs_flash": 0.75, "cuda_hopper_forward_vs_best": 0.75,
        "cuda_varlen_vs_dense": 1 / 9, "cuda_decode_vs_sdpa": 1.5, "cuda_paged_vs_sdpa": 1, "cuda_memory": 2,
    }  # fmt: skip
    assert "cuda_memory 2.000 (own 4 bytes/token, at S 10 8 bytes/token)\n  at S 20\n" in capsys.readouterr().out
    assert cuda_figures.figures({}) == []


@pytest.mark.parity
def test_a_side_that_refuses_is_named_and_any_other_error_ends_the_run(capsys):
    torch = pytest.importorskip("torch")
    for error in (torch.cuda.OutOfMemoryError("CUDA out of memory\nand more"), RuntimeError("No available kernel.")):
        assert cuda_sides.not_measured("flash", error) is None
    assert capsys.readouterr().out == ("flash: not measured: CUDA out of memory\n"
                                       "flash: not measured: No available kernel.\n")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cuda_sides.not_measured("flash", RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parity
def test_calls_are_queued_before_the_gpu_starts_on_them(monkeypatch):
    """A short kernel is timed over MOST_CALLS, in contexts entered once; one call for warming is not counted."""
    torch = pytest.importorskip("torch")
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e-3 * done[-1 - done[-2::-1].index("event"):].count("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    monkeypatch.setattr(cuda_sides, "using", lambda backend: done.append(backend) or torch.inference_mode())
    cuda_sides.seconds(cuda_sides.Inference(lambda: done.append("call"), "flash"))
    once = ["sleep", "call", "event", "call", "event"]
    assert done == ["flash", *once, *once[:3], *["call"] * cuda_sides.MOST_CALLS, "event"]


@pytest.mark.parity
@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_fp64_is_the_oracles(monkeypatch, causal):
    """In blocks of rows that do not divide the length; packed documents."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cuda_sides, "EXACT_ROWS", 7)
    lengths = [5, 1, 14]
    case = oracle.Case(2, 20, 20, 3, 3, 8, np.zeros((1, 20, 2), np.int32))
    q, k, v, dout = case.tensors()
    ranges = cuda_sides.ranges_of(lengths, causal)
    if causal:
        assert np.array_equal(ranges.numpy(), oracle.causal_ranges(20, 20, documents=[lengths]))
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    wanted = [oracle.attention(q, k, v, ranges.numpy())[0],
              *oracle.attention_gradients(q, k, v, ranges.numpy(), None, 0, dout)]
    found = cuda_sides.exact(*tensors, ranges, torch.from_numpy(dout))
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.numpy(), other, atol=1e-12)
    assert torch.equal(cuda_sides.exact(*tensors, ranges)[0], found[0])


@pytest.mark.parity
def test_the_worst_head_counts():
    torch = pytest.importorskip("torch")
    wanted = torch.ones(2, 5, 3, 4, dtype=torch.float64)
    found = wanted.clone()
    found[1, :, 2] *= 1.5
    assert cuda_sides.worst_error(found.float(), wanted) == pytest.approx(0.5)
    found[0, 3, 1, 2] = np.nan
    assert cuda_sides.worst_error(found, wanted) == np.inf
