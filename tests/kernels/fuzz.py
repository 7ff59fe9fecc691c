"""Calls every kernel of a library with random and with hostile arguments: nothing may crash, or give a NaN.

Run by test_sanitizers.py on libraries with AddressSanitizer and UBSan: `python fuzz.py LIBRARY ISA CASES`. A valid
call must fill its outputs with finite numbers; one with an argument missing, too many, or of a wrong type must be
refused; one with a wrong shape or wild values must be refused or harmless. Values are other tests' matter.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bfloat16 import rounded, widened

from llm_core.kernels import BFloat16, KernelError, Library

Array = np.ndarray | BFloat16
HEAD_DIMS = (1, 7, 32, 33, 64, 80, 96, 128, 200)
NOT_KERNELS = {"last_error", "instruction_set", "cpu_supports"}


@dataclass
class Case:
    """Arguments of a valid call; `written`: inputs that it writes to; `wild`: integer inputs that index memory."""

    inputs: list[Array]
    outputs: list[Array]
    written: list[np.ndarray] = field(default_factory=list)
    wild: list[int] = field(default_factory=list)


def numbers(rng: np.random.Generator, *shape: int, scale: float = 1) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def blank(*shape: int) -> np.ndarray:
    """An output; what a kernel does not write stays a NaN."""
    return np.full(shape, np.nan, np.float32)


def size(rng: np.random.Generator, most: int = 90) -> int:
    """Often 1, or next to a multiple of a vector's width."""
    return int(rng.choice([1, 2, 15, 16, 17, 31, 33, 64, rng.integers(1, most)]))


def to_bf16(array: np.ndarray) -> BFloat16:
    return BFloat16(rounded(array))


def visible_ranges(rng, rows: int, queries: int, keys: int) -> np.ndarray:
    """Causal, full, of packed documents, or any."""
    last = np.arange(queries) + max(keys - queries, 0) + 1
    kind = rng.integers(4)
    if kind == 0:
        ranges = np.stack([np.zeros(queries), last], -1)
    elif kind == 1:
        ranges = np.tile([0, keys], (queries, 1))
    elif kind == 2:
        document = max(int(rng.integers(1, queries + 1)), 1)
        ranges = np.stack([last - 1 - np.arange(queries) % document, last], -1)
    else:
        ranges = rng.integers(0, keys + 1, (queries, 2))
    return np.tile(np.clip(ranges, 0, keys).astype(np.int32), (rows, 1, 1))


def attention(rng: np.random.Generator, bf16_storage: bool) -> tuple[list[Array], Callable[..., Array]]:
    """Inputs of a forward call, and a maker of outputs of the same kind."""
    batch, kv_heads, group, dim = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 4), rng.choice(HEAD_DIMS)
    queries, keys = size(rng, 250), size(rng, 600)
    heads = kv_heads * group
    bf16 = bf16_storage and rng.integers(2)

    def store(array: np.ndarray) -> Array:
        return to_bf16(array) if bf16 else array

    bias = np.zeros(1, np.float32)
    if rng.integers(2):
        bias = numbers(rng, rng.choice([1, batch]), heads, keys, scale=rng.choice([1, 30]))
    inputs = [
        store(numbers(rng, batch, queries, heads, dim)),
        store(numbers(rng, batch, keys, kv_heads, dim)),
        store(numbers(rng, batch, keys, kv_heads, dim)),
        visible_ranges(rng, rng.choice([1, batch]), queries, keys),
        bias,
        np.array([rng.choice([0, 0, rng.integers(0, keys + 1)])], np.int32),
    ]
    return inputs, store


def bits(array: Array) -> np.ndarray:
    return array.bits if isinstance(array, BFloat16) else array


def values(array: Array) -> np.ndarray:
    """Its numbers as NumPy knows them."""
    return widened(array.bits) if isinstance(array, BFloat16) else array


def attention_forward(rng, library: Library, bf16_storage: bool = False) -> Case:
    inputs, store = attention(rng, bf16_storage)
    batch, queries, heads, dim = bits(inputs[0]).shape
    return Case(inputs, [store(blank(batch, queries, heads, dim)), blank(batch, heads, queries)], wild=[3, 5])


def attention_backward(forward: str, bf16_storage: bool = False) -> Callable[..., Case]:
    def make(rng, library: Library) -> Case:
        case = attention_forward(rng, library, bf16_storage)
        library.call(forward, *case.inputs, outputs=case.outputs)
        dout = numbers(rng, *bits(case.inputs[0]).shape)
        if isinstance(case.outputs[0], BFloat16):
            dout = to_bf16(dout)
        outputs = [to_bf16(blank(*x.bits.shape)) if isinstance(x, BFloat16) else blank(*x.shape)
                   for x in case.inputs[:3]]
        return Case([*case.inputs, *case.outputs, dout], outputs, wild=[3, 5])
    return make


def attention_cached(rng, library) -> Case:
    batch, kv_heads, group, dim = rng.integers(1, 4), rng.integers(1, 3), rng.integers(1, 4), rng.choice(HEAD_DIMS)
    tokens, cache = int(rng.choice([1, 1, 2, 5, size(rng)])), size(rng, 1500)
    heads = kv_heads * group
    columns = rng.integers(0, cache, tokens).astype(np.int32)
    bias = numbers(rng, rng.choice([1, batch]), heads, cache) if rng.integers(2) else np.zeros(1, np.float32)
    inputs = [numbers(rng, batch, tokens, heads, dim), numbers(rng, batch * kv_heads, cache, dim),
              numbers(rng, batch * kv_heads, cache, dim), columns,
              rng.choice([0, rng.integers(0, cache + 50), 2**31 - 1], batch).astype(np.int32), bias]
    return Case(inputs, [blank(batch, tokens, heads, dim)], wild=[3, 4])


def decode_layer(rng, library) -> Case:
    rows, kv_heads, group, dim = rng.integers(1, 9), rng.integers(1, 3), rng.integers(1, 4), 2 * rng.integers(1, 40)
    hidden, ffn, cache, tables = size(rng, 300), size(rng, 300), size(rng, 700), rng.integers(0, 2)
    q_size, kv_size, tables = kv_heads * group * dim, kv_heads * dim, rows if tables else 1
    shapes = [(rows, hidden), (hidden,), (q_size, hidden), (kv_size, hidden), (kv_size, hidden), (hidden, q_size),
              (hidden,), (ffn, hidden), (ffn, hidden), (hidden, ffn)]
    inputs = [numbers(rng, *shape, scale=0.2) for shape in shapes]
    inputs += [numbers(rng, rows * kv_heads * cache, dim) for _ in range(2)]
    inputs += [numbers(rng, tables, 1, 1, dim) for _ in range(2)]
    inputs += [np.array([rng.integers(0, cache)], np.int32), rng.integers(0, cache, rows).astype(np.int32),
               np.array([1e-6], np.float32)]
    return Case(inputs, [blank(rows, hidden)], written=inputs[10:12], wild=[14, 15])


def rms_norm_forward(rng, library) -> Case:
    rows, width = size(rng), size(rng, 900)
    inputs = [numbers(rng, rows, width), numbers(rng, width), np.array([1e-6], np.float32)]
    return Case(inputs, [blank(rows, width), blank(rows)])


def rms_norm_backward(rng, library) -> Case:
    rows, width = size(rng), size(rng, 900)
    inputs = [numbers(rng, rows, width), numbers(rng, width), numbers(rng, rows), numbers(rng, rows, width)]
    return Case(inputs, [blank(rows, width), blank(width)])


def layer_norm_forward(rng, library) -> Case:
    rows, width = size(rng), size(rng, 900)
    inputs = [numbers(rng, rows, width), numbers(rng, width), numbers(rng, width), np.array([1e-5], np.float32)]
    return Case(inputs, [blank(rows, width), blank(rows), blank(rows)])


def layer_norm_backward(rng, library) -> Case:
    rows, width = size(rng), size(rng, 900)
    inputs = [numbers(rng, rows, width), numbers(rng, width), numbers(rng, rows), numbers(rng, rows),
              numbers(rng, rows, width)]
    return Case(inputs, [blank(rows, width), blank(width), blank(width)])


def rope(rng, library) -> Case:
    batch, tokens, heads, kv_heads, half = (rng.integers(1, 4), size(rng), rng.integers(1, 5), rng.integers(1, 3),
                                            size(rng, 65))
    q, k = numbers(rng, batch, tokens, heads, 2 * half), numbers(rng, batch, tokens, kv_heads, 2 * half)
    angles = [numbers(rng, rng.choice([1, batch]), tokens, 1, 2 * half)]
    angles.append(numbers(rng, *angles[0].shape))
    return Case([q, k, *angles], [blank(*q.shape), blank(*k.shape)])


def rowwise(inputs: int, outputs: int) -> Callable[..., Case]:
    def make(rng, library) -> Case:
        shape = size(rng), size(rng, 3000)
        return Case([numbers(rng, *shape, scale=4) for _ in range(inputs)], [blank(*shape) for _ in range(outputs)])
    return make


def embedding_backward(rng, library) -> Case:
    tokens, width, vocab = size(rng), size(rng), size(rng, 400)
    ids = rng.integers(0, vocab, tokens).astype(np.int32)
    return Case([ids, numbers(rng, tokens, width)], [blank(vocab, width)], wild=[0])


def adamw(rng, library) -> Case:
    shape = [size(rng, 9000), (size(rng), size(rng)), (2, 3, size(rng))][rng.integers(3)]
    param, m, grad = (numbers(rng, *np.atleast_1d(shape)) for _ in range(3))
    v = np.abs(numbers(rng, *param.shape))
    scalars = np.array([1e-3, 0.9, 0.999, 1e-8, 0.1, 0.5, rng.integers(1, 9), rng.integers(2)], np.float32)
    return Case([param, m, v, grad, scalars], [blank(1)], written=[param, m, v])


def scale_in_place(rng, library) -> Case:
    x = numbers(rng, size(rng), size(rng, 900))
    return Case([x, numbers(rng, 1)], [blank(1)], written=[x])


def squared_norm(rng, library) -> Case:
    return Case([numbers(rng, *rng.integers(1, 40, rng.integers(1, 4)))], [blank(1)])


def labelled(rng, rows: int, vocab: int) -> np.ndarray:
    labels = rng.integers(0, vocab, rows)
    return np.where(rng.random(rows) < 0.3, -100, labels).astype(np.int32)


def cross_entropy_forward(rng, library) -> Case:
    rows, vocab = size(rng), size(rng, 3000)
    return Case([numbers(rng, rows, vocab, scale=5), labelled(rng, rows, vocab)], [blank(1), blank(rows)], wild=[1])


def cross_entropy_backward(rng, library) -> Case:
    case = cross_entropy_forward(rng, library)
    logits, labels = case.inputs
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1)).astype(np.float32)
    return Case([logits, labels, lse, numbers(rng, 1)], [blank(1)], written=[logits], wild=[1])


def linear_cross_entropy(gradients: int) -> Callable[..., Case]:
    def make(rng, library) -> Case:
        rows, width, vocab = size(rng, 300), size(rng), size(rng, 900)
        inputs = [numbers(rng, rows, width), numbers(rng, vocab, width), labelled(rng, rows, vocab)]
        return Case(inputs, [blank(1), blank(rows, width), blank(vocab, width)][: 1 + gradients], wild=[2])
    return make


def dropout(rng, library) -> Case:
    rows, width = size(rng, 300), size(rng, 300)
    key = rng.integers(-(2**31), 2**31, 2).astype(np.int32)
    place = np.array([rng.integers(-(2**31), 2**31), rng.choice([0, 1, 6554, 65535])], np.int32)
    return Case([numbers(rng, rows, width), key, place], [blank(rows, width)], wild=[1, 2])


def gemm(trans_a: bool, trans_b: bool) -> Callable[..., Case]:
    def make(rng, library) -> Case:
        m, n, k = size(rng, 300), size(rng, 300), size(rng, 600)
        a = numbers(rng, *((k, m) if trans_a else (m, k)))
        b = numbers(rng, *((n, k) if trans_b else (k, n)))
        return Case([a, b], [blank(m, n)])
    return make


OPERATORS: dict[str, Callable[..., Case]] = {
    "attention_forward": lambda rng, library: attention_forward(rng, library, bf16_storage=True),
    "attention_backward": attention_backward("attention_forward", bf16_storage=True),
    "attention_forward_bf16": attention_forward,
    "attention_backward_bf16": attention_backward("attention_forward"),
    "attention_cached": attention_cached,
    "attention_v1_forward": attention_forward,
    "attention_v1_backward": attention_backward("attention_forward"),
    "rms_norm_forward": rms_norm_forward,
    "rms_norm_backward": rms_norm_backward,
    "layer_norm_forward": layer_norm_forward,
    "layer_norm_backward": layer_norm_backward,
    "rope_forward": rope,
    "rope_backward": rope,
    "swiglu_forward": rowwise(2, 1),
    "swiglu_backward": rowwise(3, 2),
    "gelu_forward": rowwise(1, 1),
    "gelu_backward": rowwise(2, 1),
    "embedding_backward": embedding_backward,
    "adamw": adamw,
    "scale_in_place": scale_in_place,
    "squared_norm": squared_norm,
    "cross_entropy_forward": cross_entropy_forward,
    "cross_entropy_backward": cross_entropy_backward,
    "linear_cross_entropy": linear_cross_entropy(2),
    "linear_cross_entropy_bf16": linear_cross_entropy(2),
    "linear_cross_entropy_frozen": linear_cross_entropy(1),
    "linear_cross_entropy_frozen_bf16": linear_cross_entropy(1),
    "linear_cross_entropy_forward": linear_cross_entropy(0),
    "linear_cross_entropy_forward_bf16": linear_cross_entropy(0),
    "dropout": dropout,
    "linear_few": gemm(False, True),
    "decode_layer": decode_layer,
    "gemm_bf16_nt": gemm(False, True),
    "gemm_bf16_nn": gemm(False, False),
    "gemm_bf16_tn": gemm(True, False),
}


def exported(path: Path) -> set[str]:
    """Names of the functions with C linkage that a library exports."""
    done = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines() if " T " in line}
    return {name for name in names if not name.startswith("_")}


def refused(library: Library, name: str, inputs: list[Array], outputs: list[Array]) -> bool:
    try:
        library.call(name, *inputs, outputs=outputs)
    except KernelError as error:
        assert str(error).startswith(f"{name}: "), f"the message names no kernel: {error}"
        return True
    return False


def check_valid(library: Library, name: str, case: Case) -> None:
    library.call(name, *case.inputs, outputs=case.outputs)
    for index, array in enumerate([*case.outputs, *case.written]):
        array = values(array)
        assert np.isfinite(array).all(), f"output {index} {array.shape} holds {array[~np.isfinite(array)][:3]}"


def check_wrong_arguments(library: Library, name: str, case: Case, rng: np.random.Generator) -> None:
    """One argument missing, one too many, or one of a type that no kernel takes."""
    inputs, outputs = list(case.inputs), list(case.outputs)
    kind = rng.integers(3)
    if kind == 0:
        outputs.pop()
    elif kind == 1:
        outputs.append(blank(1))
    else:
        index = rng.integers(len(inputs))
        shape = bits(inputs[index]).shape
        if shape == (1,):  # may stand for "none given", of any type
            return
        inputs[index] = np.zeros(shape, np.float64)
    assert refused(library, name, inputs, outputs), f"took wrong arguments (kind {kind})"


def check_empty(library: Library, name: str, case: Case, rng: np.random.Generator) -> None:
    """A size that is 0 wherever it occurs: arguments that fit together, but have no elements."""
    arguments = [*case.inputs, *case.outputs]
    none = rng.choice(np.concatenate([bits(array).shape for array in arguments]).astype(int))
    for index, array in enumerate(arguments):
        empty = np.zeros([0 if size == none else size for size in bits(array).shape], bits(array).dtype)
        arguments[index] = BFloat16(empty) if isinstance(array, BFloat16) else empty
    assert refused(library, name, arguments[: len(case.inputs)], arguments[len(case.inputs):]), "took empty arrays"


def check_wrong_shape(library: Library, name: str, case: Case, rng: np.random.Generator) -> None:
    """One argument one longer or shorter, or of another rank: refused or, where it says another size, harmless."""
    arguments = [*case.inputs, *case.outputs]
    index = rng.integers(len(arguments))
    shape = list(bits(arguments[index]).shape)
    if kind := rng.integers(3):
        axis = rng.integers(len(shape))
        shape[axis] = max(shape[axis] + (1 if kind == 1 else -1), 1)
    else:
        shape = [1, *shape]
    changed = np.zeros(shape, bits(arguments[index]).dtype)
    arguments[index] = BFloat16(changed) if isinstance(arguments[index], BFloat16) else changed
    refused(library, name, arguments[: len(case.inputs)], arguments[len(case.inputs):])


def check_wild_values(library: Library, name: str, case: Case, rng: np.random.Generator) -> None:
    """Indices from anywhere; NaN and infinity among the numbers."""
    inputs = list(case.inputs)
    for index in case.wild:
        wild = [-(2**31), -101, -1, 0, 1, 64, 5000, 2**31 - 1]
        inputs[index] = rng.choice(wild, inputs[index].shape).astype(np.int32)
    for index, array in enumerate(inputs):
        if isinstance(array, np.ndarray) and array.dtype == np.float32 and rng.integers(2):
            inputs[index] = np.where(rng.random(array.shape) < 0.3, rng.choice([np.nan, np.inf, -np.inf, 3e38, 0]),
                                     array).astype(np.float32)
    refused(library, name, inputs, case.outputs)


def fuzz(library: Library, names: Iterable[str], cases: int) -> None:
    """`cases` valid calls of each kernel, each followed by hostile variants of it."""
    for name in names:
        for seed in range(cases):
            print(f"{name} seed {seed}", flush=True)  # the last line tells which call has crashed
            rng = np.random.default_rng([seed, sum(name.encode())])
            case = OPERATORS[name](rng, library)
            if "bf16" in name and library.isa != "avx512_bf16":
                assert refused(library, name, case.inputs, case.outputs), "bfloat16 without its instructions"
                continue
            check_valid(library, name, case)
            for check in (check_wrong_arguments, check_empty, check_wrong_shape, check_wild_values):
                check(library, name, OPERATORS[name](rng, library), rng)


if __name__ == "__main__":
    path, isa, cases = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    names = sorted(exported(path) - NOT_KERNELS)
    if unknown := [name for name in names if name not in OPERATORS]:
        sys.exit(f"exported, but not in this file's table: {unknown}")
    fuzz(Library(path, isa), names, cases)
    print(f"{len(names)} kernels")
