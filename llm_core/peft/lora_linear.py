"""The linear layer with a low-rank update beside its frozen weight."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.layers import Linear, Parts, initial_normal, initial_uniform
from llm_core.models.spec import DecoderSpec
from llm_core.peft.lora import LORA_A, LORA_B, MAGNITUDE, scaling, targets

if TYPE_CHECKING:
    from llm_core.config.model_section import LoraConfig

NORMAL_DEVIATION = 0.01  # of MindSpore's initializer "normal"


class LoraFactory:
    """Makes a model's linear layers (`Parts.make_linear`), those that `pet` targets with an update."""

    def __init__(self, spec: DecoderSpec, pet: LoraConfig, seed: int) -> None:
        """seed: of the update's initial values. Raises UserError if nothing is targeted."""
        self._pet, self._seed = pet, seed
        self._targets = targets(spec, pet)

    def __call__(
        self, name: str, in_size: int, out_size: int, bias: bool, std: float, seed: int | None, parts: Parts
    ) -> Linear:
        if name not in self._targets:
            return Linear(name, in_size, out_size, bias, std, seed, parts)
        return LoraLinear(name, in_size, out_size, bias, std, seed, parts, self._pet, self._seed)


class LoraLinear(Linear):
    """y = x W^T + scaling dropout(x) A^T B^T (+ bias): x fp32 [N, in] -> fp32 [N, out].

    Beside `Linear`'s parameters `<name>.mindpet_delta_lora_a` [rank, in] and `<name>.mindpet_delta_lora_b` [out, rank].
    Dropout is keyed (see `ops.Dropout`): without a key there is none, as in evaluation and prediction. bf16 as in
    `Linear`, also of the two products of the update, unless pet.compute_dtype says otherwise.

    DoRA: each of W + scaling B A's rows is scaled to the trained length `<name>.mindpet_delta_lora_magnitude` [out],
    y = magnitude / |W + scaling B A| (x W^T + scaling dropout(x) A^T B^T) + bias. The gradient takes the norm for a
    constant (arXiv 2402.09353, section 4.3). Hugging Face's PEFT does the same without dropout; with dropout it drops x
    in both products, at the price of a third one.
    """

    is_plain = False

    def __init__(
        self, name: str, in_size: int, out_size: int, bias: bool, std: float, seed: int | None, parts: Parts,
        pet: LoraConfig, adapter_seed: int,
    ) -> None:  # fmt: skip
        super().__init__(name, in_size, out_size, bias, std, seed, parts)
        a_name, b_name = f"{name}.{LORA_A}", f"{name}.{LORA_B}"
        a_shape, b_shape = (pet.lora_rank, in_size), (out_size, pet.lora_rank)
        self.lora_a = Parameter(
            parts.tensor(a_name, a_shape, lambda shape: _initial(pet.lora_a_init, a_name, shape, adapter_seed)),
            name=a_name,
        )
        self.lora_b = Parameter(
            parts.tensor(b_name, b_shape, lambda shape: _initial(pet.lora_b_init, b_name, shape, adapter_seed)),
            name=b_name,
        )
        self.scaling = scaling(pet)
        update_bf16 = parts.bf16 if pet.compute_dtype is None else pet.compute_dtype == "bfloat16"
        self.down, self.up = core_ops.LinearProduct(update_bf16), core_ops.LinearProduct(update_bf16)
        site = _site(name) if self.exit is None else parts.own_site(_site(name))  # a cut input: channels of its own
        self.drop = core_ops.Dropout(pet.lora_dropout, site) if pet.lora_dropout else None
        self.magnitude = None
        if pet.use_dora:
            self.magnitude = Parameter(Tensor(np.ones(out_size, np.float32)), name=f"{name}.{MAGNITUDE}")
            self.reset_magnitude()

    def construct(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        seen = x
        if self.drop is not None and key is not None:
            seen = self.drop(x, key)
        low = self.down(seen, self.lora_a) * self.scaling
        y = self.product(x, self.weight) + self.up(low, self.lora_b)
        y = y if self.exit is None else self.exit(y)
        if self.magnitude is not None:
            y = y * (self.magnitude / ops.stop_gradient(self.row_norms()))
        return y if self.bias is None else self.add_bias(y, self.bias)

    def row_norms(self) -> Tensor:
        """Lengths of the rows of W + scaling B A: fp32 [out]."""
        weight = self.weight + ops.matmul(self.lora_b, self.lora_a) * self.scaling
        return ops.sqrt(ops.square(weight).sum(-1))

    def reset_magnitude(self) -> None:
        """Let DoRA begin at the weights that are there now, so that it changes nothing yet."""
        delta = self.lora_b.asnumpy() @ self.lora_a.asnumpy() * np.float32(self.scaling)
        norms = np.linalg.norm(self.weight.asnumpy() + delta, axis=1)
        self.magnitude.set_data(Tensor(norms.astype(np.float32), dtype=ms.float32))


def _initial(kind: str, name: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """he_uniform is MindFormers' HeUniform(sqrt 5): uniform within 1 / sqrt(in), as of torch's own linear layers."""
    if kind == "he_uniform":
        return initial_uniform(name, shape, 1 / math.sqrt(shape[1]), seed)
    return initial_normal(name, shape, NORMAL_DEVIATION, seed if kind == "normal" else None)


def _site(name: str) -> int:
    """The place of a layer's dropout (see `ops.DropoutMask`), by its name: no other layer makes a difference to it."""
    return int.from_bytes(hashlib.sha256(f"lora:{name}".encode()).digest()[:4], "little")


def reset_magnitudes(net: nn.Cell) -> None:
    """`reset_magnitude` of every DoRA layer: for a fresh adapter, after its base has been loaded."""
    for _, cell in net.cells_and_names():
        if isinstance(cell, LoraLinear) and cell.magnitude is not None:
            cell.reset_magnitude()
