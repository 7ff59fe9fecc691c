"""The sides of benchmarks/cuda_attention.py: our kernels on torch's tensors, torch's attention, attention in fp64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = {  # side -> names of its kernels
    "own": ("attention_forward", "attention_backward"),
    "tf32": ("attention_forward_tf32", "attention_backward_tf32"),
    "hopper": ("attention_hopper_forward", "attention_hopper_backward"),
    "rows": ("attention_rows_forward", None),
}
TORCH = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}  # of SDPBackend
HOPPER_DIMS = (64, 128)
REFUSALS = ("No available kernel", "execution plans")  # in what SDPA and cuDNN say to a shape that they do not take
BLOCK = 0.01  # seconds of work that one measurement is the mean of
MOST_CALLS = 200  # that wait for the GPU at once: more might fill its queue, and then the host's time would be measured
HEAD_START = 20_000_000  # cycles that the GPU waits for the host: 10 ms and more, in which all calls are queued
EXACT_ROWS = 2048  # query rows that attention in fp64 deals with at a time


def refusal() -> str | None:
    """Why nothing can be measured on this machine; None if it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed (make parity)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU with CUDA"
    from llm_core.kernels import KernelsUnavailable, cuda_library

    try:
        cuda_library()
    except KernelsUnavailable as error:
        return f"no CUDA kernels: {error}"
    return None


class TorchKernels:
    """A library of the CUDA kernels, called with torch's tensors on torch's stream."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.last_error.restype = ctypes.c_char_p

    def has(self, name: str | None) -> bool:
        """Whether the library has a kernel of that name, and this GPU runs it."""
        import torch

        there = name is not None and hasattr(self._library, name)
        return there and ("hopper" not in name or torch.cuda.get_device_capability() == (9, 0))

    def prepared(self, name: str, *inputs: Any, outputs: list[Any]) -> Callable[[], None]:
        """A call of the kernel, all but ready: what is left to do costs a few microseconds."""
        import torch

        tensors = [*inputs, *outputs]
        if any(not (x.is_cuda and x.is_contiguous()) for x in tensors):
            raise ValueError(f"{name}: its tensors must be contiguous and on the GPU")
        count = len(tensors)
        shapes = [(ctypes.c_int64 * max(x.ndim, 1))(*x.shape) for x in tensors]
        function = getattr(self._library, name)
        arguments = (
            ctypes.c_int(count),
            (ctypes.c_void_p * count)(*[x.data_ptr() for x in tensors]),
            (ctypes.c_int * count)(*[x.ndim for x in tensors]),
            (ctypes.POINTER(ctypes.c_int64) * count)(*[ctypes.cast(x, ctypes.POINTER(ctypes.c_int64)) for x in shapes]),
            (ctypes.c_char_p * count)(*[str(x.dtype).removeprefix("torch.").encode() for x in tensors]),
        )

        def call() -> None:
            if function(*arguments, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), None):
                raise RuntimeError(self._library.last_error().decode())

        call.tensors = tensors  # which live as long as the call
        return call


@dataclass
class Side:
    """One side's passes, and what they have computed."""

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None
    results: Callable[[], list[Any]]  # out, and dq, dk, dv if there is a backward pass; [B, S, H, D]


@dataclass(frozen=True)
class Inference:
    """A call of torch's without gradients, by a backend of TORCH (None: torch's choice).

    Entering its contexts costs as much as a short kernel: `seconds` does so once for many calls.
    """

    call: Callable[[], Any]
    backend: str | None = None

    def __call__(self) -> Any:
        with self.contexts():
            return self.call()

    def contexts(self) -> Any:
        """To be entered around the call."""
        import torch

        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(using(self.backend))
        return stack


@dataclass(frozen=True)
class Problem:
    """Self-attention of some numbers; every side sees the same ones."""

    dtype: str  # float32 | bfloat16 | float16
    batch: int
    heads: int
    length: int
    dim: int
    causal: bool

    def tensors(self, seed: int = 0) -> tuple[Any, Any, Any, Any]:
        """q, k, v, dout [B, S, H, D] on the GPU."""
        import torch

        random = torch.Generator("cuda").manual_seed(seed)
        shape = (self.batch, self.length, self.heads, self.dim)
        return tuple(torch.randn(shape, generator=random, device="cuda").to(getattr(torch, self.dtype))
                     for _ in range(4))

    def ranges(self) -> Any:
        """int32 [1, S, 2], the keys that each query sees."""
        return ranges_of([self.length], self.causal)


def ranges_of(lengths: list[int], causal: bool) -> Any:
    """int32 [1, T, 2] for documents of these lengths behind each other, on the CPU."""
    import torch

    counts = torch.tensor(lengths)
    last = counts.cumsum(0)
    starts = (last - counts).repeat_interleave(counts)
    ends = torch.arange(1, int(last[-1]) + 1) if causal else last.repeat_interleave(counts)
    return torch.stack([starts, ends], -1).to(torch.int32)[None]


def own_side(kernels: TorchKernels, side: str, ranges: Any, q: Any, k: Any, v: Any, dout: Any) -> Side | None:
    """Our kernels of that name; None where the library has none, or they do not take the width."""
    import torch

    forward_name, backward_name = OWN[side]
    if not kernels.has(forward_name) or side == "hopper" and q.shape[-1] not in HOPPER_DIMS:
        return None
    inputs = [q, k, v, ranges.cuda(), torch.zeros(1, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")]
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device="cuda")
    forward = kernels.prepared(forward_name, *inputs, outputs=[out, lse])
    if not kernels.has(backward_name):
        return Side(forward, None, lambda: [out])
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    backward = kernels.prepared(backward_name, *inputs, out, lse, dout, outputs=gradients)
    return Side(forward, backward, lambda: [out, *gradients])


def torch_side(backend: str, causal: bool, q: Any, k: Any, v: Any, dout: Any) -> Side | None:
    """scaled_dot_product_attention by one of its backends; None where it refuses, or its memory does not suffice.

    The backward pass runs alone, over a graph that is kept.
    """
    import torch
    import torch.nn.functional as F

    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    gradient = dout.transpose(1, 2)

    def attend() -> Any:
        return F.scaled_dot_product_attention(*leaves, is_causal=causal)

    try:
        with using(backend):
            out = attend()
        torch.autograd.grad(out, leaves, gradient, retain_graph=True)
    except RuntimeError as error:
        return not_measured(backend, error)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return Side(Inference(attend, backend), backward,
                lambda: [x.detach().transpose(1, 2) for x in (out, *backward())])


def unfused_side(causal: bool, q: Any, k: Any, v: Any) -> Side | None:
    """Attention by torch's plain operators, forward; None where its memory does not suffice."""
    import torch

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    hidden = torch.full((q.shape[2], k.shape[2]), -torch.inf, device="cuda", dtype=q.dtype).triu(1) if causal else None

    def forward() -> Any:
        with torch.no_grad():
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            return torch.softmax(scores if hidden is None else scores.add_(hidden), -1) @ v

    try:
        forward()
    except RuntimeError as error:
        return not_measured("unfused", error)
    return Side(forward, None, lambda: [forward().transpose(1, 2)])


def not_measured(name: str, error: RuntimeError) -> None:
    """Say that a side lacks memory or does not take the shape; any other error is raised again."""
    import torch

    if not isinstance(error, torch.cuda.OutOfMemoryError) and not any(words in str(error) for words in REFUSALS):
        raise error
    print(f"{name}: not measured: {str(error).splitlines()[0]}", flush=True)


def using(backend: str | None) -> Any:
    """A context in which torch attends by that backend of TORCH; None: by the one that it chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, TORCH[backend])) if backend else nullcontext()


def seconds(call: Callable[[], Any]) -> float:
    """Time of a call by the GPU's own clock: the mean over calls that take BLOCK together, or MOST_CALLS.

    The GPU starts on them when all are queued, after one for warming, so the host's time is no part of it.
    """
    import torch

    plain, contexts = (call.call, call.contexts()) if isinstance(call, Inference) else (call, nullcontext())

    def timed(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        plain()
        begin.record()
        for _ in range(count):
            plain()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    with contexts:
        return timed(min(MOST_CALLS, max(1, round(BLOCK / max(timed(1), 1e-6)))))


def exact(q: Any, k: Any, v: Any, ranges: Any, dout: Any = None) -> list[Any]:
    """out, and dq, dk, dv if dout is given, in fp64; q, k, v, dout [B, S, H, D], ranges int32 [1, S, 2]."""
    import torch

    results = [torch.empty_like(x, dtype=torch.float64) for x in ([q] if dout is None else [q, q, k, v])]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            heads = [x[b, :, h].double() for x in (q, k, v)]
            gradient = None if dout is None else dout[b, :, h].double()
            for result, found in zip(results, _exact_head(*heads, ranges[0].to(q.device), gradient), strict=True):
                result[b, :, h] = found
    return results


def _exact_head(q: Any, k: Any, v: Any, ranges: Any, dout: Any) -> list[Any]:
    """The same for one head, [S, D]; every query sees a key."""
    import torch

    scale, key = q.shape[1] ** -0.5, torch.arange(len(k), device=q.device)
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in torch.arange(len(q), device=q.device).split(EXACT_ROWS):
        scores = q[rows] @ k.T * scale
        hidden = (key < ranges[rows, :1]) | (key >= ranges[rows, 1:])
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        out[rows] = weights @ v
        if dout is None:
            continue
        d_weights = dout[rows] @ v.T
        d_scores = weights * (d_weights - (dout[rows] * out[rows]).sum(-1, keepdim=True)) * scale
        dq[rows] = d_scores @ k
        dk += d_scores.T @ q[rows]
        dv += weights.T @ dout[rows]
    return [out] if dout is None else [out, dq, dk, dv]


def worst_error(found: Any, wanted: Any) -> float:
    """Largest of ||found - wanted|| / ||wanted|| over all batch items and heads of [B, S, H, D]; a NaN is infinite."""
    worst = float(((found.double() - wanted).norm(dim=(1, 3)) / wanted.norm(dim=(1, 3))).max())
    return worst if worst == worst else math.inf


def errors(sides: Mapping[str, Side], wanted: list[Any]) -> dict[str, dict[str, float]]:
    """Output -> side -> `worst_error`; runs every side once."""
    found: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        side.forward()
        if side.backward:
            side.backward()
        for output, mine, exactly in zip(("out", "dq", "dk", "dv"), side.results(), wanted, strict=False):
            found.setdefault(output, {})[name] = worst_error(mine, exactly)
    return found


class Pool:
    """Memory that the kernels have taken for themselves: the driver's pool of the GPU, which torch does not use."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._pool = ctypes.c_void_p()
        self._check(self._driver.cuDeviceGetDefaultMemPool(ctypes.byref(self._pool), ctypes.c_int(0)))

    HIGH = ctypes.c_int(8)  # CU_MEMPOOL_ATTR_USED_MEM_HIGH

    def reset(self) -> None:
        """Forget the highest use so far."""
        self._check(self._driver.cuMemPoolSetAttribute(self._pool, self.HIGH, ctypes.byref(ctypes.c_uint64(0))))

    def highest(self) -> int:
        """Bytes in use at once, at most, since reset()."""
        found = ctypes.c_uint64()
        self._check(self._driver.cuMemPoolGetAttribute(self._pool, self.HIGH, ctypes.byref(found)))
        return found.value

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA's driver: error {code}")
