"""One problem of each operator for each side: the kernels, torch, MindSpore. For benchmarks/operators.py.

A problem is the same for all: arrays of `arrays(name, scale)`; OPERATORS makes of them own's and torch's calls,
`mindspore_calls` MindSpore's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

EPS = 1e-5
ADAMW = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
FORWARD, BOTH, ONLY = "forward", "forward + backward", "all"
# name -> sizes of its matrices before `scale`: rows first, then columns, then a vocabulary where there is one
SIZES = {
    "cross_entropy": (512, 32000),
    "linear_cross_entropy": (1024, 384, 8192),
    "linear_cross_entropy_bf16": (1024, 384, 8192),
    "linear_cross_entropy_135m": (1024, 576, 49152),
    "linear_cross_entropy_135m_bf16": (1024, 576, 49152),
    "adamw": (18_900_000,),
    "rms_norm": (4096, 768),
    "layer_norm": (4096, 768),
    "rope": (4096, 12, 4, 64),
    "swiglu": (2048, 3072),
    "gelu": (2048, 3072),
    "embedding_gradient": (1024, 576, 49152),
    "gemm_nt_bf16": (1024, 576, 1536),
    "gemm_nn_bf16": (1024, 576, 1536),
    "gemm_tn_bf16": (1024, 576, 1536),
    "gemm_head_nt_bf16": (1024, 576, 49152),
    "gemm_head_nn_bf16": (1024, 576, 49152),
    "gemm_head_tn_bf16": (1024, 576, 49152),
}


@dataclass
class Problem:
    """Calls of own and torch, by pass; `results` runs both once and gives what they have computed, as arrays."""

    own: dict[str, Callable[[], Any]]
    torch: dict[str, Callable[[], Any]]
    results: Callable[[], tuple[Sequence[Any], Sequence[Any]]]
    tolerance: float = 1e-5


def sizes(name: str, scale: int) -> tuple[int, ...]:
    """SIZES with rows and vocabularies divided by `scale`."""
    rows, *rest = SIZES[name]
    if name in ("cross_entropy", "embedding_gradient") or name.startswith(("linear", "gemm")):
        rest[-1] //= scale
    return rows // scale, *rest


def arrays(name: str, scale: int) -> list[Any]:
    """Normally distributed fp32 matrices, and int32 labels or ids, an eighth of the labels ignored."""
    random, size = np.random.default_rng(0), sizes(name, scale)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape, np.float32)

    def labels(count: int, vocabulary: int) -> Any:
        ids = random.integers(0, vocabulary, count).astype(np.int32)
        ids[::8] = -100
        return ids

    if name == "cross_entropy":
        return [normal(*size), labels(*size)]
    if name.startswith("linear_cross_entropy"):
        rows, width, vocabulary = size
        return [normal(rows, width), normal(vocabulary, width) * np.float32(0.02), labels(rows, vocabulary)]
    if name == "adamw":
        return [normal(*size), normal(*size) * np.float32(0.1), normal(*size) ** 2, normal(*size)]
    if name in ("rms_norm", "layer_norm"):
        return [normal(*size), normal(*size), normal(size[1]), normal(size[1])]  # x, dy, weight, bias
    if name == "rope":
        length, heads, kv_heads, dim = size
        angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, dim, 2) / dim))
        cos = np.cos(np.concatenate((angles, angles), 1)).astype(np.float32)[None, :, None]
        sin = np.sin(np.concatenate((-angles, angles), 1)).astype(np.float32)[None, :, None]
        q, k = (1, length, heads, dim), (1, length, kv_heads, dim)
        return [normal(*q), normal(*k), cos, sin, normal(*q), normal(*k)]
    if name in ("swiglu", "gelu"):
        return [normal(*size), normal(*size), normal(*size)]  # gate (x), up, dy
    rows, width, vocabulary = size
    if name == "embedding_gradient":
        return [random.integers(0, vocabulary, rows).astype(np.int32), normal(rows, width)]
    x, weight, dy = normal(rows, width), normal(vocabulary, width), normal(rows, vocabulary)
    return {"nt": [x, weight], "nn": [dy, weight], "tn": [dy, x]}[name.split("_")[-2]]


# ------------------------------------------------------------------------------------------------------- own and torch


def _tools() -> tuple[Any, Any, Any]:
    import torch
    import torch.nn.functional as F

    from benchmarks.attention_sides import kernels

    return kernels().call, torch, F


def _autograd(forward: Callable[[], Any], leaves: Sequence[Any], douts: Sequence[Any]) -> dict[str, Callable]:
    """torch's calls; the graph is made anew each time, as in training."""
    import torch

    def alone() -> Any:
        with torch.no_grad():
            return forward()

    def both() -> tuple[Any, Any]:
        out = forward()
        return out, torch.autograd.grad(out, leaves, douts)

    return {FORWARD: alone, BOTH: both}


def _own(forward: Callable[[], Any], backward: Callable[[], Any]) -> dict[str, Callable]:
    def both() -> None:
        forward()
        backward()

    return {FORWARD: forward, BOTH: both}


def _compare(own: dict, torch_calls: dict, outputs: Sequence[Any]) -> Callable:
    """Results of BOTH: `outputs` are own's arrays, in the order of torch's outputs and then gradients."""

    def results() -> tuple[Sequence[Any], Sequence[Any]]:
        own[BOTH]()
        out, gradients = torch_calls[BOTH]()
        theirs = [*(out if isinstance(out, tuple) else (out,)), *gradients]
        return outputs, [x.detach().float().numpy().reshape(y.shape) for x, y in zip(theirs, outputs, strict=True)]

    return results


def _leaves(*given: Any) -> list[Any]:
    import torch

    return [torch.from_numpy(x.copy()).requires_grad_() for x in given]


def _cross_entropy(scale: int) -> Problem:
    call, torch, F = _tools()
    logits, labels = arrays("cross_entropy", scale)
    loss, lse, one, done = np.empty(1, "f"), np.empty(len(labels), "f"), np.ones(1, "f"), np.empty(1, "f")
    (leaf,), target = _leaves(logits), torch.from_numpy(labels).long()
    own = _own(lambda: call("cross_entropy_forward", logits, labels, outputs=[loss, lse]),
               lambda: call("cross_entropy_backward", logits, labels, lse, one, outputs=[done]))  # fmt: skip
    theirs = _autograd(lambda: F.cross_entropy(leaf, target, reduction="sum"), [leaf], [torch.ones(())])
    return Problem(own, theirs, _compare(own, theirs, [loss, logits]))  # the gradient lies in the logits' place


def _linear_cross_entropy(name: str, scale: int) -> Problem:
    call, torch, F = _tools()
    x, weight, labels = arrays(name, scale)
    suffix = "_bf16" if name.endswith("_bf16") else ""
    loss, dx, dweight = np.empty(1, "f"), np.empty_like(x), np.empty_like(weight)
    own = {
        FORWARD: lambda: call(f"linear_cross_entropy_forward{suffix}", x, weight, labels, outputs=[loss]),
        BOTH: lambda: call(f"linear_cross_entropy{suffix}", x, weight, labels, outputs=[loss, dx, dweight]),
    }
    dtype = torch.bfloat16 if suffix else torch.float32
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in _leaves(x, weight)]
    target = torch.from_numpy(labels).long()
    # .float() as transformers has it: from logits in bfloat16 the loss is some per cent off
    theirs = _autograd(lambda: F.cross_entropy(F.linear(*leaves).float(), target, reduction="sum"), leaves,
                       [torch.ones(())])  # fmt: skip
    return Problem(own, theirs, _compare(own, theirs, [loss, dx, dweight]), 2e-2 if suffix else 1e-5)


def _adamw(scale: int) -> Problem:
    call, torch, _ = _tools()
    param, m, v, grad = arrays("adamw", scale)
    leaf = torch.nn.Parameter(torch.from_numpy(param.copy()))
    optimizer = torch.optim.AdamW([leaf], lr=ADAMW["lr"], betas=(ADAMW["beta1"], ADAMW["beta2"]), eps=ADAMW["eps"],
                                  weight_decay=ADAMW["weight_decay"], fused=True)  # fmt: skip
    leaf.grad = torch.from_numpy(grad)
    m[:], v[:] = 0, 0  # as torch begins
    numbers, done = np.array([*ADAMW.values(), 1, 1, 1], np.float32), np.empty(1, "f")
    own = {ONLY: lambda: call("adamw", param, m, v, grad, numbers, outputs=[done])}

    def results() -> tuple[Sequence[Any], Sequence[Any]]:
        own[ONLY]()
        optimizer.step()
        return [param], [leaf.detach().numpy()]

    return Problem(own, {ONLY: optimizer.step}, results)


def _norm(name: str, scale: int) -> Problem:
    call, torch, F = _tools()
    x, dy, weight, bias = arrays(name, scale)
    eps, y, dx, dweight, dbias = np.array([EPS], "f"), *(np.empty_like(a) for a in (x, x, weight, bias))
    mean, rstd = np.empty(len(x), "f"), np.empty(len(x), "f")
    if name == "rms_norm":
        leaves = _leaves(x, weight)
        own = _own(lambda: call("rms_norm_forward", x, weight, eps, outputs=[y, rstd]),
                   lambda: call("rms_norm_backward", x, weight, rstd, dy, outputs=[dx, dweight]))  # fmt: skip
        outputs = [y, dx, dweight]
        theirs = _autograd(lambda: F.rms_norm(leaves[0], weight.shape, leaves[1], EPS), leaves, [torch.from_numpy(dy)])
    else:
        leaves = _leaves(x, weight, bias)
        own = _own(lambda: call("layer_norm_forward", x, weight, bias, eps, outputs=[y, mean, rstd]),
                   lambda: call("layer_norm_backward", x, weight, mean, rstd, dy, outputs=[dx, dweight, dbias]))
        outputs = [y, dx, dweight, dbias]
        theirs = _autograd(lambda: F.layer_norm(leaves[0], weight.shape, *leaves[1:], EPS), leaves,
                           [torch.from_numpy(dy)])  # fmt: skip
    return Problem(own, theirs, _compare(own, theirs, outputs))


def _rope(scale: int) -> Problem:
    """torch's side is transformers' apply_rotary_pos_emb; heads outside, as there."""
    call, torch, _ = _tools()
    q, k, cos, sin, dq, dk = arrays("rope", scale)
    turned, gradients = [np.empty_like(q), np.empty_like(k)], [np.empty_like(q), np.empty_like(k)]
    own = _own(lambda: call("rope_forward", q, k, cos, sin, outputs=turned),
               lambda: call("rope_backward", dq, dk, cos, sin, outputs=gradients))  # fmt: skip
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    leaves, douts = _leaves(q, k), [torch.from_numpy(x) for x in (dq, dk)]
    their_cos, their_sin = (torch.from_numpy(x)[:, :, 0] for x in (cos, sin))
    half = their_sin.shape[-1] // 2
    their_sin = torch.cat((-their_sin[..., :half], their_sin[..., half:]), -1)  # theirs has no half negated

    def turn() -> Any:
        heads_outside = [x.transpose(1, 2) for x in leaves]
        return tuple(x.transpose(1, 2) for x in apply_rotary_pos_emb(*heads_outside, their_cos, their_sin))

    theirs = _autograd(turn, leaves, douts)
    return Problem(own, theirs, _compare(own, theirs, [*turned, *gradients]))


def _activation(name: str, scale: int) -> Problem:
    call, torch, F = _tools()
    gate, up, dy = arrays(name, scale)
    y, dgate, dup = (np.empty_like(gate) for _ in range(3))
    if name == "swiglu":
        leaves = _leaves(gate, up)
        own = _own(lambda: call("swiglu_forward", gate, up, outputs=[y]),
                   lambda: call("swiglu_backward", gate, up, dy, outputs=[dgate, dup]))  # fmt: skip
        theirs = _autograd(lambda: F.silu(leaves[0]) * leaves[1], leaves, [torch.from_numpy(dy)])
        return Problem(own, theirs, _compare(own, theirs, [y, dgate, dup]))
    leaves = _leaves(gate)
    own = _own(lambda: call("gelu_forward", gate, outputs=[y]),
               lambda: call("gelu_backward", gate, dy, outputs=[dgate]))  # fmt: skip
    theirs = _autograd(lambda: F.gelu(leaves[0]), leaves, [torch.from_numpy(dy)])
    return Problem(own, theirs, _compare(own, theirs, [y, dgate]))


def _embedding_gradient(scale: int) -> Problem:
    call, torch, _ = _tools()
    ids, dy = arrays("embedding_gradient", scale)
    vocabulary = sizes("embedding_gradient", scale)[-1]
    table = np.empty((vocabulary, dy.shape[1]), "f")
    their_ids, their_dy = torch.from_numpy(ids).long(), torch.from_numpy(dy)
    own = {ONLY: lambda: call("embedding_backward", ids, dy, outputs=[table])}
    theirs = {ONLY: lambda: torch.ops.aten.embedding_dense_backward(their_dy, their_ids, vocabulary, -1, False)}
    return Problem(own, theirs, _results_of_one(own, theirs, table))


def _gemm(name: str, scale: int) -> Problem:
    call, torch, _ = _tools()
    a, b = arrays(name, scale)
    kind = name.split("_")[-2]
    their_a, their_b = (torch.from_numpy(x).bfloat16() for x in (a, b))
    product = {"nt": lambda: their_a @ their_b.T, "nn": lambda: their_a @ their_b, "tn": lambda: their_a.T @ their_b}
    c = np.empty(tuple(product[kind]().shape), "f")
    own, theirs = {ONLY: lambda: call(f"gemm_bf16_{kind}", a, b, outputs=[c])}, {ONLY: product[kind]}
    return Problem(own, theirs, _results_of_one(own, theirs, c), 1e-2)


def _results_of_one(own: dict, theirs: dict, output: Any) -> Callable:
    def results() -> tuple[Sequence[Any], Sequence[Any]]:
        own[ONLY]()
        return [output], [theirs[ONLY]().float().numpy()]

    return results


def _maker(name: str) -> Callable[[int], Problem]:
    if name.startswith("linear_cross_entropy"):
        return partial(_linear_cross_entropy, name)
    if name.startswith("gemm"):
        return partial(_gemm, name)
    if name.endswith("_norm"):
        return partial(_norm, name)
    if name in ("swiglu", "gelu"):
        return partial(_activation, name)
    return {"cross_entropy": _cross_entropy, "adamw": _adamw, "rope": _rope,
            "embedding_gradient": _embedding_gradient}[name]  # fmt: skip


OPERATORS: dict[str, Callable[[int], Problem]] = {name: _maker(name) for name in SIZES}
"""name -> function of `scale` that makes the problem."""


# ------------------------------------------------------------------------------------------------------------ MindSpore


def mindspore_calls(name: str, scale: int) -> dict[str, Callable[[], Any]]:
    """The reference Cell of the same problem in GRAPH_MODE, by pass; every call waits for its result."""
    from mindspore import Parameter, Tensor, nn, ops

    from llm_core.ops import reference

    class Gradients(nn.Cell):
        """Of all inputs, from the gradients of all outputs."""

        def __init__(self, cell):
            super().__init__()
            self.cell = cell
            self.gradient = ops.GradOperation(get_all=True, sens_param=True)

        def construct(self, *inputs):
            return self.gradient(self.cell)(*inputs)

    def both(cell: nn.Cell, inputs: Sequence[Tensor], douts: Any) -> dict[str, Callable[[], Any]]:
        gradients = Gradients(cell)
        return {FORWARD: lambda: _wait(cell(*inputs)), BOTH: lambda: _wait(gradients(*inputs, douts))}

    given = [Tensor(x) for x in arrays(name, scale)]
    one = Tensor(np.float32(1))
    if name == "cross_entropy" or name.startswith("linear_cross_entropy"):
        cell = reference.TokenNll() if name == "cross_entropy" else reference.LinearNll()
        return both(cell, given, (one, one))
    if name == "adamw":
        update = reference.AdamUpdate((ADAMW["beta1"], ADAMW["beta2"]), ADAMW["eps"], ADAMW["weight_decay"],
                                      decoupled=True, bias_correction=True)  # fmt: skip

        class Step(nn.Cell):
            def __init__(self):
                super().__init__()
                self.update = update
                self.slots = [Parameter(x, name=f"slot{i}") for i, x in enumerate(given[:3])]
                self.param, self.m, self.v = self.slots

            def construct(self, grad, lr, step, coef):
                return self.update(self.param, self.m, self.v, grad, self.update.settings(lr, step, coef), True)

        cell = Step()
        return {ONLY: lambda: _wait(cell(given[3], Tensor(np.float32(ADAMW["lr"])), one, one))}
    if name.endswith("_norm"):
        x, dy, weight, bias = given
        if name == "rms_norm":
            return both(reference.RmsNorm(EPS), [x, weight], dy)
        return both(reference.LayerNorm(EPS), [x, weight, bias], dy)
    if name == "rope":
        return both(reference.Rope(), given[:4], tuple(given[4:]))
    if name == "swiglu":
        return both(reference.SwiGlu(), given[:2], given[2])
    if name == "gelu":
        return both(reference.Gelu(), given[:1], given[2])
    if name == "embedding_gradient":
        vocabulary = sizes(name, scale)[-1]
        table = Tensor(np.zeros((vocabulary, given[1].shape[1]), np.float32))
        gradients = Gradients(reference.EmbeddingLookup(vocabulary))
        return {ONLY: lambda: _wait(gradients(table, given[0], given[1]))}
    kind = name.split("_")[-2]

    class Product(nn.Cell):
        def __init__(self):
            super().__init__()
            self.product = ops.MatMul(transpose_a=kind[0] == "t", transpose_b=kind[1] == "t")

        def construct(self, a, b):
            return self.product(a, b)

    product = Product()
    return {ONLY: lambda: _wait(product(*given))}


def _wait(results: Any) -> None:
    """Until the smallest of them can be read: MindSpore hands results out before they are there."""
    results = results if isinstance(results, tuple) else (results,)
    min(results, key=lambda tensor: tensor.size).asnumpy()
