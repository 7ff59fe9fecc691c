"""The parts with weights: linear layer, embedding, norm; who makes them; and their deterministic initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.alibi import AlibiBias
from llm_core.models.spec import DecoderSpec


def initial_normal(name: str, shape: tuple[int, ...], std: float, seed: int | None) -> np.ndarray:
    """Values of parameter `name` at the start: fp32, normal(0, std), the same on every machine and layout.

    Each parameter has a generator of its own, keyed by (seed, name), so its values do not depend on which
    other parameters exist or in which order they are made. `seed` None gives zeros, for a model about to be
    loaded.
    """
    if seed is None:
        return np.zeros(shape, np.float32)
    return _generator(name, seed).standard_normal(shape, dtype=np.float32) * np.float32(std)


def initial_uniform(name: str, shape: tuple[int, ...], bound: float, seed: int) -> np.ndarray:
    """As `initial_normal`, uniform between -bound and bound."""
    values = _generator(name, seed).random(shape, dtype=np.float32)
    return (2 * values - 1) * np.float32(bound)


def _generator(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


class Linear(nn.Cell):
    """y = x weight^T (+ bias): x fp32 [N, in] -> fp32 [N, out]; `<name>.weight` [out, in], `<name>.bias` [out].

    parts: what is held of the weight, and what comes before the bias; default all of it, and nothing. is_plain: it is a
    product with a whole matrix and nothing else.
    """

    is_plain = True

    def __init__(
        self, name: str, in_size: int, out_size: int, bias: bool, std: float, seed: int | None,
        parts: Parts | None = None,
    ):  # fmt: skip
        super().__init__(auto_prefix=False)
        parts = parts or Parts()
        full_name = f"{name}.weight"
        weight = parts.tensor(full_name, (out_size, in_size), lambda shape: initial_normal(full_name, shape, std, seed))
        self.weight, self.bias = Parameter(weight, name=full_name), None
        if bias:
            self.bias = Parameter(parts.tensor(f"{name}.bias", (out_size,), _zeros), name=f"{name}.bias")
        self.product, self.read, self.exit = parts.product(full_name), parts.read(full_name), parts.exit(name)
        self.add_bias = ops.BiasAdd()

    def construct(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """key: of dropout (`ops.dropout_key`), of which a plain layer has none."""
        y = self.product(x, self.weight)
        y = y if self.exit is None else self.exit(y)
        return y if self.bias is None else self.add_bias(y, self.bias)

    def used_weight(self) -> Tensor:
        """The matrix that x is multiplied by, where not all of it is held."""
        return self.weight if self.read is None else self.read(self.weight)


class Embedding(nn.Cell):
    """Rows of a table: ids int32 [N] -> fp32 [N, D]; the table [V, D] is `<name>.embedding_weight`."""

    def __init__(
        self, name: str, vocab_size: int, size: int, std: float, seed: int | None, parts: Parts | None = None
    ):
        super().__init__(auto_prefix=False)
        parts = parts or Parts()
        full_name = f"{name}.embedding_weight"
        table = parts.tensor(full_name, (vocab_size, size), lambda shape: initial_normal(full_name, shape, std, seed))
        self.embedding_weight = Parameter(table, name=full_name)
        self.read = parts.read(full_name)
        self.lookup = core_ops.EmbeddingLookup(vocab_size)

    def construct(self, ids: Tensor) -> Tensor:
        return self.lookup(self.used_weight(), ids)

    def used_weight(self) -> Tensor:
        """As of `Linear`."""
        return self.embedding_weight if self.read is None else self.read(self.embedding_weight)


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


class Parts:
    """Makes the parts of a model, and says what surrounds them. Adapters set `make_linear`; a parallel layout overrides
    the rest, so that a rank holds only its share of a weight.

    bf16: products are of bfloat16-rounded numbers.
    """

    def __init__(self, bf16: bool = False) -> None:
        self.bf16 = bf16
        self.make_linear: Callable[..., Linear] = Linear

    def linear(self, name: str, in_size: int, out_size: int, bias: bool, std: float, seed: int | None) -> Linear:
        """A Cell that maps x [N, in] and a dropout key (or None) to [N, out]."""
        return self.make_linear(name, in_size, out_size, bias, std, seed, self)

    def embedding(self, name: str, vocab_size: int, size: int, std: float, seed: int | None) -> Embedding:
        """A Cell that maps ids [N] to [N, size]."""
        return Embedding(name, vocab_size, size, std, seed, self)

    def alibi(self, heads: int) -> nn.Cell:
        """The position bias of these heads, see `AlibiBias`."""
        return AlibiBias(heads)

    def own_site(self, site: int) -> int:
        """The place (see `ops.DropoutMask`) of a dropout on what only this rank holds; `site` is the model's."""
        return site

    def row_site(self, site: int) -> int:
        """The same, of a dropout on hidden states between the layers."""
        return site

    def own_kv_heads(self) -> slice:
        """Which of the model's key/value heads are held."""
        return slice(None)

    def local(self, spec: DecoderSpec) -> DecoderSpec:
        """The sizes of what is held of the model `spec`: of its heads and its feed-forward layers."""
        return spec

    # ---- of one weight, by its name

    def tensor(self, name: str, shape: tuple[int, ...], values: Callable[[tuple[int, ...]], np.ndarray]) -> Tensor:
        """What is held of a weight at the start. values: those of a weight of a given shape; shape: the default one."""
        return Tensor(values(shape))

    def read(self, name: str) -> nn.Cell | None:
        """A Cell from what is held of a weight to what is used; None = the same."""
        return None

    def product(self, name: str) -> nn.Cell:
        """A Cell (x [N, in], what is held of the weight) -> x weight^T, see `ops.LinearProduct`."""
        return core_ops.LinearProduct(self.bf16)

    # ---- between the parts

    def entry(self) -> nn.Cell | None:
        """A Cell [N, hidden] -> [N, hidden] between a norm and the linear layers that read it; None = nothing."""
        return None

    def exit(self, name: str) -> nn.Cell | None:
        """A Cell [N, out] -> [N, out] behind the product of the linear layer `name`; None = nothing."""
        return None

    def head_entry(self) -> nn.Cell | None:
        """As `entry`, between the last norm and the head."""
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
