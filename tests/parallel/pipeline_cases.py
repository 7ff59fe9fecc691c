"""Tiny models with everything that a pipeline has to carry, and one window of batches for them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llm_core.config.model_section import LoraConfig, PrefixTuningConfig
from llm_core.models.spec import DecoderSpec
from llm_core.parallel.cuts import Cut, cut_parameters
from llm_core.parallel.layout import Layout, Place
from llm_core.peft.apply import adapter_shapes

BATCHES, ROWS, LENGTH, VOCAB = 5, 2, 12, 48
SCALE = 8.0

LLAMA = DecoderSpec(
    vocab_size=VOCAB, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40,
    max_position=64, initializer_range=0.3,
)  # fmt: skip
FALCON = replace(
    LLAMA, norm="layer", mlp="gelu", tied_head=True, residual="parallel", num_kv_heads=1, num_layers=2
)


@dataclass(frozen=True)
class Case:
    """A model, its adapter, and the layout that it runs in."""

    spec: DecoderSpec
    pet: Any = None
    layout: Layout = field(default=Layout(pp=2))

    def cuts(self, layout: Layout) -> dict[str, Cut]:
        """What the ranks of a layout hold of every parameter."""
        return cut_parameters(self.spec, layout, adapter_shapes(self.spec, self.pet))


CASES = {
    "llama with dropout": Case(replace(LLAMA, hidden_dropout=0.1, attention_dropout=0.1)),
    "tied llama, interleaved": Case(replace(LLAMA, tied_head=True, num_layers=5), layout=Layout(pp=2, chunks=2)),
    "falcon": Case(FALCON),
    "falcon with LoRA on its last layer": Case(
        FALCON, LoraConfig(pet_type="lora", target_modules=".*wq|.*wo", exclude_layers="model.layers.0.*")
    ),
    "llama with a prefix, interleaved": Case(
        replace(LLAMA, num_layers=4),
        PrefixTuningConfig(pet_type="prefixtuning", prefix_token_num=3, mid_dim=7, dropout_rate=0.1),
        Layout(pp=2, chunks=2),
    ),
}
CASES_OF_FOUR = {
    "four stages": Case(replace(LLAMA, num_layers=4, hidden_dropout=0.1), layout=Layout(pp=4)),
    "four stages, interleaved": Case(
        replace(LLAMA, tied_head=True, num_layers=8), layout=Layout(pp=4, chunks=2)
    ),
    "tensor and sequence parallelism inside": Case(
        replace(LLAMA, num_layers=2), layout=Layout(pp=2, tp=2, sequence_parallel=True, whole_embedding=False)
    ),
}


def fill(net, cuts: Mapping[str, Cut], layout: Layout, place: Place) -> None:
    """Give the net what the rank at `place` holds of weights that depend on their names alone."""
    from mindspore import Tensor

    for parameter in net.get_parameters():
        cut, random = cuts[parameter.name], np.random.RandomState(zlib.crc32(parameter.name.encode()))
        values = random.standard_normal(cut.shape)
        scale = "norm" in parameter.name and parameter.name.endswith("weight")
        values = (1 + 0.2 * values if scale else 0.1 * values).astype(np.float32)
        parameter.set_data(Tensor(np.ascontiguousarray(cut.take(values, layout, place, 3))))


def window() -> tuple[list, Any, Any]:
    """(tokens, labels, dropout key) of each micro-batch, some labels ignored; 1 / supervised tokens; the loss scale."""
    from mindspore import Tensor

    from llm_core.ops import dropout_key

    random, batches, supervised = np.random.RandomState(3), [], 0
    for index in range(BATCHES):
        tokens, labels = random.randint(1, VOCAB, (2, ROWS, LENGTH)).astype(np.int32)
        labels[0, : 2 * index] = -100
        supervised += int((labels != -100).sum())
        batches.append((Tensor(tokens), Tensor(labels), Tensor(dropout_key(1, 4, index))))
    return batches, Tensor(np.float32(1 / supervised)), Tensor(np.float32(SCALE))


def zero_sums(weights):
    """An accumulator for each weight."""
    import mindspore as ms

    return ms.ParameterTuple(
        ms.Parameter(ms.Tensor(np.zeros(weight.shape, np.float32)), name=f"grad_sum.{weight.name}")
        for weight in weights
    )
