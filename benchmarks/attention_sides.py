"""One problem of attention for each side: the kernels, torch's SDPA, naive torch. For benchmarks/attention.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HEADS = 8


def kernels() -> Any:
    """The kernels that this machine uses."""
    from llm_core.kernels import library

    return library()


@dataclass
class Sides:
    """Calls of one problem: pass -> side -> call; `check` compares what own and torch compute."""

    calls: dict[str, dict[str, Callable[[], Any]]]
    check: Callable[[], dict[str, float]]


def sides(dtype: str, ranges: Any, length: int, dim: int, mask: Any = None, naive: bool = False) -> Sides:
    """The calls of batch 1, HEADS heads.

    Args:
        dtype: fp32 | bf16.
        ranges: int32 [1, S, 2], the keys that each query sees.
        mask: the same for torch: None (full), True (causal) or fp32 [S, S], added to the scores.
        naive: with attention by plain torch operators as well.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    random = np.random.default_rng(0)
    q, k, v, dout = (random.standard_normal((1, length, HEADS, dim), np.float32) for _ in range(4))
    torch_type = torch.float32 if dtype == "fp32" else torch.bfloat16
    theirs = [torch.from_numpy(x).transpose(1, 2).contiguous().to(torch_type) for x in (q, k, v, dout)]
    leaves, their_dout = [x.requires_grad_() for x in theirs[:3]], theirs[3]
    dense = mask.to(torch_type) if torch.is_tensor(mask) else None

    def sdpa() -> Any:
        return F.scaled_dot_product_attention(*leaves, attn_mask=dense, is_causal=mask is True)

    def plain() -> Any:
        scores = leaves[0] @ leaves[1].transpose(-2, -1) * dim**-0.5
        return torch.softmax(scores if plain_mask is None else scores + plain_mask, -1) @ leaves[2]

    calls: dict[str, dict[str, Callable[[], Any]]] = {"fwd": {}, "bwd": {}}
    own_forward, own_backward, own_results = own_calls(dtype, ranges, q, k, v, dout)
    calls["fwd"]["own"], calls["bwd"]["own"] = own_forward, own_backward
    sides = {"torch": sdpa}
    if naive:
        sides["naive"] = plain
        plain_mask = torch.full((length, length), -torch.inf, dtype=torch_type).triu(1) if mask is True else None
    for name, forward in sides.items():
        out = forward()
        calls["fwd"][name] = without_gradient(forward)
        calls["bwd"][name] = lambda out=out: torch.autograd.grad(out, leaves, their_dout, retain_graph=True)

    def check() -> dict[str, float]:
        own_forward()
        own_backward()
        found = [sdpa(), *calls["bwd"]["torch"]()]
        names = ("out", "dq", "dk", "dv")
        return {name: relative(ours, other.detach().transpose(1, 2).float().numpy())
                for name, ours, other in zip(names, own_results(), found, strict=True)}

    return Sides(calls, check)


def own_calls(dtype: str, ranges: Any, q: Any, k: Any, v: Any, dout: Any) -> tuple[Callable, Callable, Callable]:
    """Forward, backward, and what they have computed, (out, dq, dk, dv) in fp32."""
    import numpy as np

    from llm_core.kernels import BFloat16

    def stored(x: Any) -> Any:
        return x if dtype == "fp32" else BFloat16(rounded(x))

    library, nothing, no_prefix = kernels(), np.zeros(1, np.float32), np.zeros(1, np.int32)
    inputs = [*map(stored, (q, k, v)), ranges, nothing, no_prefix]
    out, gradients = stored(np.empty_like(q)), [stored(np.empty_like(x)) for x in (q, k, v)]
    lse, dout = np.empty((1, q.shape[2], q.shape[1]), np.float32), stored(dout)

    def forward() -> None:
        library.call("attention_forward", *inputs, outputs=[out, lse])

    def backward() -> None:
        library.call("attention_backward", *inputs, out, lse, dout, outputs=gradients)

    def results() -> list[Any]:
        return [x if dtype == "fp32" else widened(x.bits) for x in (out, *gradients)]

    return forward, backward, results


def rounded(x: Any) -> Any:
    """fp32 -> the bits of the nearest bfloat16, uint16."""
    import numpy as np

    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: Any) -> Any:
    """bfloat16 bits -> fp32."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def relative(found: Any, wanted: Any) -> float:
    """||found - wanted|| / ||wanted||."""
    import numpy as np

    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def without_gradient(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` under torch.no_grad()."""
    import torch

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def all_keys(length: int, causal: bool) -> Any:
    """int32 [1, S, 2]: every query sees all keys, or those up to its own."""
    import numpy as np

    ranges = np.zeros((1, length, 2), np.int32)
    ranges[..., 1] = np.arange(1, length + 1) if causal else length
    return ranges


