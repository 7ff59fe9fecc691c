"""Tiny models with fixed weights and random adapters, ours and Hugging Face's, for the tests of adapters' files."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import falcon_cases  # noqa: E402
import llama_cases  # noqa: E402
from decoder_runs import VOCAB, fixed_values  # noqa: E402

from llm_core.config.model_section import LoraConfig  # noqa: E402
from llm_core.models.shapes import parameter_shapes  # noqa: E402
from llm_core.peft import lora  # noqa: E402

ATTENTION, EVERY = "wq|wk|wv|wo", "w"
TOKENS = np.random.RandomState(3).randint(1, VOCAB, (2, 12)).astype(np.int32)
RANK = 3


def cases_of(name: str):
    """The module that knows a case's sizes: Falcon's names begin with falcon_."""
    return falcon_cases if name.startswith("falcon_") else llama_cases


def spec_of(name: str):
    return cases_of(name).spec_of(name.removeprefix("falcon_"))


def hf_model(name: str):
    return cases_of(name).hf_model(name.removeprefix("falcon_"))


def base_weights(spec) -> dict[str, np.ndarray]:
    """The fixed weights that `hf_model` has, under our names, in the projections that the spec has."""
    from dataclasses import replace

    from llm_core.checkpoint.qkv import ConcatView

    shapes = parameter_shapes(replace(spec, qkv_concat=False))
    split = {name: fixed_values(name, shape) for name, shape in shapes.items()}
    return dict(ConcatView(split, parameter_shapes(spec)))


def random_adapter(spec, pet: LoraConfig) -> dict[str, np.ndarray]:
    """Values that change the model: neither factor zero, DoRA's magnitudes some tenths off the rows' lengths."""
    base = base_weights(spec)
    tensors = {}
    for name, shape in lora.shapes(spec, pet).items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        tensors[name] = 0.2 * values
        if name.endswith(lora.MAGNITUDE):
            lengths = np.linalg.norm(base[name.replace(lora.MAGNITUDE, "weight")], axis=1)
            tensors[name] = (lengths * (1 + 0.2 * values)).astype(np.float32)
    return tensors


def pet_config(**changes) -> LoraConfig:
    """A pet_config; alpha / rank is no power of two."""
    fields = dict(pet_type="lora", lora_rank=RANK, lora_alpha=7, lora_dropout=0.1, target_modules=ATTENTION)
    return LoraConfig(**(fields | changes))


def our_logits(spec, pet: LoraConfig | None, adapter: dict[str, np.ndarray]) -> np.ndarray:
    """fp32 [B, S, V] of the fixed weights with an adapter beside them."""
    from mindspore import Tensor

    from llm_core.peft.apply import build_net

    net = build_net(spec, pet, seed=None)
    values = base_weights(spec) | adapter
    parameters = net.parameters_dict()
    assert parameters.keys() == values.keys()
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(values[name]))
    return net.set_train(False)(Tensor(TOKENS)).asnumpy()


def hf_logits(model) -> np.ndarray:
    """fp32 [B, S, V] of a torch model."""
    import torch

    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        return model.eval()(tokens, attention_mask=torch.ones_like(tokens)).logits.numpy()
