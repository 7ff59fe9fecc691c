"""Tiny models and every layout that the tests of sharded checkpoints hold against each other."""

from __future__ import annotations

import numpy as np

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.reshard import Share
from llm_core.models.spec import DecoderSpec
from llm_core.parallel.cuts import cut_parameters
from llm_core.parallel.layout import Layout

_SIZES = {"vocab_size": 16, "hidden_size": 16, "num_layers": 4, "num_heads": 4, "head_dim": 4, "max_position": 16}
SPECS = {
    "llama": DecoderSpec(**_SIZES, num_kv_heads=2, ffn_size=24),
    "falcon": DecoderSpec(
        **_SIZES, num_kv_heads=1, ffn_size=64, norm="layer", residual="parallel", mlp="gelu", tied_head=True,
        qkv_bias=True, output_bias=True, mlp_bias=True,
    ),
}  # fmt: skip
_PLAIN = {
    "one": {}, "dp2": {"dp": 2}, "dp4": {"dp": 4}, "tp2": {"tp": 2}, "tp4": {"tp": 4}, "pp2": {"pp": 2},
    "pp4": {"pp": 4}, "dp2_tp2": {"dp": 2, "tp": 2}, "tp2_pp2": {"tp": 2, "pp": 2}, "dp2_pp2": {"dp": 2, "pp": 2},
    "dp2_tp4": {"dp": 2, "tp": 4, "whole_embedding": False}, "pp2_chunks2": {"pp": 2, "chunks": 2},
}  # fmt: skip
LAYOUTS = {name: Layout(**sizes) for name, sizes in _PLAIN.items()} | {
    f"{name}_zero{zero}": Layout(**sizes, zero=zero, zero_threshold=0)
    for name, sizes in _PLAIN.items() if sizes.get("dp", 1) > 1 for zero in (1, 2, 3)
}  # fmt: skip


def adapter(spec):
    """Whole shapes of a LoRA of rank 2 with DoRA's magnitudes on a row- and two column-parallel layers."""
    sizes = {"attention.wk": (spec.kv_size, spec.hidden_size), "feed_forward.w2": (spec.hidden_size, spec.ffn_size)}
    found = {}
    for layer in range(spec.num_layers):
        for leaf, (rows, columns) in sizes.items():
            start = f"model.layers.{layer}.{leaf}.mindpet_delta_lora"
            found |= {f"{start}_a": (2, columns), f"{start}_b": (rows, 2), f"{start}_magnitude": (rows,)}
    return found


def shares(spec, layout):
    """Of every rank, the adapter included."""
    cuts = cut_parameters(spec, layout, adapter(spec))
    return [Share(layout, rank, cuts) for rank in range(layout.world)]


def whole_tensors(spec):
    """Random weights, adapter and Adam's first moments, and a counter."""
    rng = np.random.default_rng(0)
    cuts = cut_parameters(spec, Layout(), adapter(spec))
    tensors = {name: rng.standard_normal(cut.shape).astype(np.float32) for name, cut in cuts.items()}
    tensors |= {f"adam_m.{name}": rng.standard_normal(cut.shape).astype(np.float32) for name, cut in cuts.items()}
    return tensors | {"global_step": np.array(7, np.int32)}


def parts(tensors, share):
    """What the rank of `share` holds, by the layout's own rule (`Cut.take`)."""
    held = {}
    for name, array in tensors.items():
        cut = share.cuts.get(name) or share.cuts.get(name.partition(".")[2])
        place = share.layout.place(share.rank)
        if cut is None:
            held[name] = array
        elif place.stage in cut.stages:
            same = array.shape == cut.shape  # Adafactor's state has another shape, of parameters that are not cut
            held[name] = cut.take(array, share.layout, place, 3 if name in share.cuts else 1) if same else array
    return held


class Memory:
    """An open weight file whose tensors are in memory."""

    metadata: dict[str, str] = {}

    def __init__(self, path, tensors):
        self.path, self._tensors = path, tensors
        self.heads = {name: head_of(array) for name, array in tensors.items()}

    def read(self, name):
        return self._tensors[name]

    def verify(self):
        pass

    def close(self):
        pass
