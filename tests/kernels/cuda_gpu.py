"""The CUDA kernels on a real GPU, called with NumPy arrays as the emulator's are; the arrays travel as torch tensors.

Run alone it holds every kernel of the library against attention in fp64, for compute-sanitizer to watch:

    scripts/cuda_sanitize.sh                       # memcheck and racecheck
    python tests/kernels/cuda_gpu.py               # without them

A GPU and a torch that can use it have to be there; test_cuda_gpu.py runs the emulator's tests on them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import attention_oracle as oracle  # noqa: E402
import test_cuda_decode as decode  # noqa: E402
from elementwise import relative  # noqa: E402
from test_attention import settings  # noqa: E402

from llm_core.kernels import BFloat16, KernelError, KernelsUnavailable, cuda_library  # noqa: E402
from llm_core.kernels.nvcc import gpus  # noqa: E402

KERNELS = {  # beginning of the names "..._forward" and "..._backward", with what ends them: dtypes
    ("attention", ""): ("float32", "bfloat16", "float16"),
    ("attention", "_tf32"): ("float32",),
    ("attention_v1", ""): ("float32",),
    ("attention_rows", ""): ("float32",),
    ("attention_hopper", ""): ("bfloat16", "float16"),
}
HOPPER_DIMS = (64, 128)
# Beside the emulator's cases: enough blocks that every kernel takes its largest on a GPU of 132 multiprocessors, and a
# row over which the roundings of a softmax's maximum add up, if they do.
LARGE = {f"whole GPU, D {dim}": oracle.Case(2, 150, 150, 70, 70, dim, oracle.causal_ranges(150, 150))
         for dim in (32, 64, 96, 128)}
LONG = {f"8192 keys, D {dim}": oracle.Case(1, 64, 8192, 2, 2, dim, oracle.full_ranges(64, 8192)) for dim in (64, 128)}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}  # relative; single kernels' tests are stricter


def why_not() -> str | None:
    """What a GPU's tests lack here, but for the kernels, which `Gpu` compiles; None if it is nothing."""
    if not gpus():  # asked first: importing torch takes seconds
        return "nvidia-smi tells of no GPU"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no GPU of CUDA"


class Gpu:
    """The library of the GPU at hand, with the calls of `Emulator`. KernelsUnavailable."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(cuda_library().path))
        self._library.last_error.restype = ctypes.c_char_p

    def has(self, name: str) -> bool:
        """Whether the library has this kernel, and the GPU runs it."""
        import torch

        return hasattr(self._library, name) and ("hopper" not in name or torch.cuda.get_device_capability() == (9, 0))

    def seed(self, number: int) -> None:
        """Nothing: a GPU's threads run in an order of its own."""

    def call(self, name: str, *inputs: np.ndarray | BFloat16, outputs: Sequence[np.ndarray | BFloat16] = ()) -> None:
        """Run a kernel, on the device and back. KernelError: it refused its arguments."""
        import torch

        arguments = [*inputs, *outputs]
        arrays = [argument.bits if isinstance(argument, BFloat16) else argument for argument in arguments]
        names = [b"bfloat16" if isinstance(argument, BFloat16) else argument.dtype.name.encode()
                 for argument in arguments]
        count, shapes = len(arrays), [(ctypes.c_int64 * max(array.ndim, 1))(*array.shape) for array in arrays]
        memory = [_on_device(array) for array in arrays]
        code = getattr(self._library, name)(
            ctypes.c_int(count),
            (ctypes.c_void_p * count)(*[bytes_.data_ptr() for bytes_ in memory]),
            (ctypes.c_int * count)(*[array.ndim for array in arrays]),
            (ctypes.POINTER(ctypes.c_int64) * count)(*[ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
                                                       for shape in shapes]),
            (ctypes.c_char_p * count)(*names),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            None,
        )
        if code:
            raise KernelError(self._library.last_error().decode())
        for array, bytes_ in zip(arrays[len(inputs):], memory[len(inputs):], strict=True):
            array[...] = bytes_.cpu().numpy().view(array.dtype).reshape(array.shape)


def _on_device(array: np.ndarray):
    """The bytes of an array, as far past a boundary of 16 bytes as they lie on the host."""
    import torch

    begin = array.ctypes.data % 16
    memory = torch.empty(begin + array.nbytes, dtype=torch.uint8, device="cuda")[begin:]
    memory.copy_(torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
    return memory


def forward_and_backward(gpu: Gpu, start: str, ending: str, dtype: str) -> Iterator[tuple[str, float]]:
    """(case and output, relative error) for every case that the kernels take."""
    large = {} if start in ("attention_v1", "attention_rows") else LARGE | LONG
    for name, case in (oracle.cases() | large).items():
        if case.dim not in (HOPPER_DIMS if start == "attention_hopper" else range(129)):
            continue
        tensors = decode.in_dtype(dtype, *case.tensors())
        q, k, v, dout = map(decode.unstored, tensors)
        out, lse = (decode.stored(np.full_like(q, np.nan), tensors[0]),
                    np.full((case.batch, case.heads, case.q_len), np.nan, np.float32))
        gpu.call(f"{start}_forward{ending}", *tensors[:3], *settings(case), outputs=[out, lse])
        wanted = oracle.attention(q, k, v, case.ranges, case.bias, case.prefix)
        found = {"out": (decode.unstored(out), wanted[0]), "lse": (lse, wanted[1])}
        if gpu.has(f"{start}_backward{ending}"):
            grads = [decode.stored(np.full_like(x, np.nan), tensors[0]) for x in (q, k, v)]
            gpu.call(f"{start}_backward{ending}", *tensors[:3], *settings(case), out, lse, tensors[3], outputs=grads)
            exact = oracle.attention_gradients(q, k, v, case.ranges, case.bias, case.prefix, dout)
            found |= {f"d{x}": (decode.unstored(grad), gradient)
                      for x, grad, gradient in zip("qkv", grads, exact, strict=True)}
        for output, (mine, exactly) in found.items():
            nothing = np.abs(exactly).max() < 1e-9  # of a gradient that is zero but for rounding the absolute error
            yield f"{name}, {output}", np.abs(mine).max() if nothing else relative(mine, exactly)


def decoding(gpu: Gpu, dtype: str) -> Iterator[tuple[str, float]]:
    """The same for the cases of decoding, contiguous and paged."""
    for name, case in decode.CASES.items():
        *arrays, bias = case.tensors()
        q, k, v = decode.in_dtype(dtype, *arrays)
        wanted = case.wanted(*map(decode.unstored, (q, k, v)), bias)
        page = next(size for size in (16, 10, 3, 1) if case.positions % size == 0)
        yield f"{name}, contiguous", relative(case.cached(gpu, q, k, v, bias), wanted)
        yield f"{name}, paged", relative(case.paged(gpu, page, q, k, v, bias), wanted)


def main() -> int:
    try:
        gpu = None if (reason := why_not()) else Gpu()
    except KernelsUnavailable as error:
        reason = str(error)
    if reason:
        print(f"cuda_gpu: nothing to run: {reason}", file=sys.stderr)
        return 2
    failed = False
    runs = [(f"{start}{ending}", dtype, forward_and_backward(gpu, start, ending, dtype))
            for (start, ending), dtypes in KERNELS.items() for dtype in dtypes if gpu.has(f"{start}_forward{ending}")]
    runs += [("attention_cached and _paged", dtype, decoding(gpu, dtype)) for dtype in TOLERANCE]
    for name, dtype, errors in runs:
        where, worst = max(errors, key=lambda pair: (not pair[1] == pair[1], pair[1]))  # a NaN is the worst
        good = worst < TOLERANCE[dtype]
        failed |= not good
        print(f"{'ok' if good else 'WRONG':5} {name} {dtype}: largest relative error {worst:.1e} ({where})", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
