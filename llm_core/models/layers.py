"""The parts with weights: linear layer, embedding, norm; who makes them; and their deterministic initial values."""

from __future__ import annotations

import hashlib

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.alibi import AlibiBias


class Parts:
    """Makes the parts of a model, by name. Adapters and tensor parallelism give others in their places.

    bf16: products are of bfloat16-rounded numbers.
    """

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16

    def linear(
        self, name: str, in_size: int, out_size: int, bias: bool, std: float, seed: int | None
    ) -> nn.Cell:
        """A Cell that maps x [N, in] and a dropout key (or None) to [N, out]."""
        return Linear(name, in_size, out_size, bias, std, seed, self.bf16)

    def embedding(self, name: str, vocab_size: int, size: int, std: float, seed: int | None) -> nn.Cell:
        """A Cell that maps ids [N] to [N, size]; its table is `embedding_weight`."""
        return Embedding(name, vocab_size, size, std, seed)

    def alibi(self, heads: int) -> nn.Cell:
        """The position bias of these heads, see `AlibiBias`."""
        return AlibiBias(heads)

    def entry(self) -> nn.Cell | None:
        """A Cell [N, hidden] -> [N, hidden] between a norm and the linear layers that read it; None = nothing."""
        return None

    def head_entry(self) -> nn.Cell | None:
        """The same, between the last norm and the head."""
        return None

    def whole_logits(self) -> nn.Cell | None:
        """A Cell from what the head gives to the logits of the whole vocabulary, [N, V]; None = that is what it gives.
        """
        return None

    def token_nll(self) -> nn.Cell:
        """The loss on what the head gives, see `ops.TokenNll`."""
        return core_ops.TokenNll()

    def linear_nll(self, frozen: bool) -> nn.Cell:
        """The same from the head's input and matrix, see `ops.LinearNll`."""
        return core_ops.LinearNll(self.bf16, frozen=frozen)


def initial_normal(name: str, shape: tuple[int, ...], std: float, seed: int | None) -> Tensor:
    """Values of parameter `name` at the start: fp32, normal(0, std), the same on every machine and layout.

    Each parameter has a generator of its own, keyed by (seed, name), so its values do not depend on which
    other parameters exist or in which order they are made. `seed` None gives zeros, for a model about to be
    loaded.
    """
    if seed is None:
        return Tensor(np.zeros(shape, np.float32))
    return Tensor(_generator(name, seed).standard_normal(shape, dtype=np.float32) * np.float32(std))


def initial_uniform(name: str, shape: tuple[int, ...], bound: float, seed: int) -> Tensor:
    """As `initial_normal`, uniform between -bound and bound."""
    values = _generator(name, seed).random(shape, dtype=np.float32)
    return Tensor((2 * values - 1) * np.float32(bound))


def _generator(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


class Linear(nn.Cell):
    """y = x weight^T (+ bias): x fp32 [N, in] -> fp32 [N, out]; `<name>.weight` [out, in], `<name>.bias` [out].

    bf16: the product is of bfloat16-rounded numbers, see `ops.LinearProduct`. is_plain: it does nothing else.
    """

    is_plain = True

    def __init__(
        self, name: str, in_size: int, out_size: int, bias: bool, std: float, seed: int | None, bf16: bool = False
    ):
        super().__init__(auto_prefix=False)
        full_name = f"{name}.weight"
        self.weight = Parameter(initial_normal(full_name, (out_size, in_size), std, seed), name=full_name)
        self.bias = Parameter(Tensor(np.zeros(out_size, np.float32)), name=f"{name}.bias") if bias else None
        self.product = core_ops.LinearProduct(bf16)
        self.add_bias = ops.BiasAdd()

    def construct(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """key: of dropout (`ops.dropout_key`), of which a plain layer has none."""
        y = self.product(x, self.weight)
        return y if self.bias is None else self.add_bias(y, self.bias)


class Embedding(nn.Cell):
    """Rows of a table: ids int32 [N] -> fp32 [N, D]; the table [V, D] is `<name>.embedding_weight`."""

    def __init__(self, name: str, vocab_size: int, size: int, std: float, seed: int | None):
        super().__init__(auto_prefix=False)
        full_name = f"{name}.embedding_weight"
        self.embedding_weight = Parameter(initial_normal(full_name, (vocab_size, size), std, seed), name=full_name)
        self.lookup = core_ops.EmbeddingLookup(vocab_size)

    def construct(self, ids: Tensor) -> Tensor:
        return self.lookup(self.embedding_weight, ids)


class Norm(nn.Cell):
    """RMSNorm ("rms") or LayerNorm ("layer"): x fp32 [N, D] -> fp32 [N, D].

    `<name>.weight` [D], ones at the start; LayerNorm has `<name>.bias` [D], zeros at the start, as well.
    """

    def __init__(self, name: str, kind: str, size: int, eps: float):
        super().__init__(auto_prefix=False)
        self.weight = Parameter(Tensor(np.ones(size, np.float32)), name=f"{name}.weight")
        self.bias = None
        if kind == "layer":
            self.bias = Parameter(Tensor(np.zeros(size, np.float32)), name=f"{name}.bias")
        self.norm = core_ops.RmsNorm(eps) if self.bias is None else core_ops.LayerNorm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight) if self.bias is None else self.norm(x, self.weight, self.bias)
