"""Tiny Falcons, one of each architecture, and what this project and HF make of them.

Used by the tests of the model and by tools/make_golden.py; only the functions named hf_* need torch.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
from decoder_runs import PROMPT, VOCAB, data, fixed_values, hf_greedy, hf_results, our_results

from llm_core.checkpoint.hf import from_hf, parts_of_fused
from llm_core.checkpoint.hf_fused import HfView, QkvLayout
from llm_core.config.hf_folder import has_two_norms, hf_config_to_model_config, qkv_grouping
from llm_core.config.model_section import ModelSection
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec, spec_from_config

NEW_TOKENS = 64
KV_START = np.array([0, 4, 7], np.int32)  # the prompts of the generation differ in length, padded on the left
TRAINED = 32  # positions of the scaled cases; the batch is longer

_OLD = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True}
_SEVEN = {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False}
_FORTY = {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}
_ROPE = {"alibi": False, "rope_theta": 100.0, "max_position_embeddings": TRAINED}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
# name -> keys of HF's config. The slopes of 4 heads are powers of two; those of 12 heads are not, and show that they
# are rounded to bfloat16.
CASES: dict[str, dict] = {
    "rw": _OLD | {"alibi": True, "hidden_size": 48, "num_attention_heads": 12},
    "rw_rope": _OLD | {"alibi": False},
    "7b": _SEVEN | {"alibi": False},
    "40b": _FORTY | {"alibi": False, "tie_word_embeddings": False, "ffn_hidden_size": 40},
    "7b_alibi": _SEVEN | {"alibi": True},
    "40b_alibi": _FORTY | {"alibi": True, "hidden_size": 48, "num_attention_heads": 12},
    "11b": _FORTY | {"alibi": False, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0},
    "linear": _SEVEN | _ROPE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": _FORTY | _ROPE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": _SEVEN | _ROPE | {"rope_scaling": _YARN},
}
DEEP = ("rw", "40b")  # cases with two layers; the others have one, which compiles faster


def config_of(name: str) -> dict:
    """A case's config.json."""
    layers = 2 if name in DEEP else 1
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_hidden_layers=layers)
    return {"model_type": "falcon"} | sizes | CASES[name]


def spec_of(name: str) -> DecoderSpec:
    """Our spec of a case, by way of the `model` section of a run file."""
    config = hf_config_to_model_config(config_of(name)) | {"seq_length": PROMPT + NEW_TOKENS}
    return spec_from_config(
        ModelSection.model_validate({"arch": {"type": "FalconForCausalLM"}, "model_config": config})
    )


@cache
def run(name: str) -> SimpleNamespace:
    """Our results on a case, with the greedy continuation of the left-padded prompts, int32 [B, NEW_TOKENS]."""
    from llm_core.infer.generate import Generator
    from llm_core.infer.sampling import SamplingParams

    spec = spec_of(name)
    results = our_results(spec)
    prompts = [row[first:PROMPT].tolist() for row, first in zip(data()[0], KV_START, strict=True)]
    generator = Generator(results.net, spec, eos_ids=[], pad_id=0)
    answers = generator.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS))
    results.greedy = np.array([answer.token_ids for answer in answers])
    return results


def hf_model(name: str):
    """HF's model of a case with the fixed weights, fp32, in eval mode.

    Attention is "sdpa", HF's default: its "eager" adds ALiBi twice (transformers 4.57.1).
    """
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    fields = {key: value for key, value in config_of(name).items() if key != "model_type"}
    model = FalconForCausalLM(FalconConfig(**fields, attn_implementation="sdpa")).eval()
    spec = spec_of(name)
    ours = {name: fixed_values(name, shape) for name, shape in parameter_shapes(spec).items()}
    two_norms = has_two_norms(hf_config_to_model_config(config_of(name)))
    theirs = HfView(ours, "falcon", QkvLayout(*qkv_grouping(config_of(name))), two_norms)
    report = model.load_state_dict({name: torch.from_numpy(array) for name, array in theirs.items()}, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["lm_head.weight"] if spec.tied_head else [])
    return model


def hf_run(name: str) -> SimpleNamespace:
    """HF's results on a case, with greedy [B, NEW_TOKENS]."""
    layout = QkvLayout(*qkv_grouping(config_of(name)))

    def by_our_names(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ours = {from_hf(name): array for name, array in found.items() if not parts_of_fused(name)}
        fused = {name: array for name, array in found.items() if parts_of_fused(name)}
        parts = {
            part: layout.part(array, index)
            for name, array in fused.items()
            for index, part in enumerate(parts_of_fused(name))
        }
        return ours | parts

    theirs = hf_results(hf_model(name), by_our_names)
    theirs.greedy = hf_greedy(hf_model(name), data()[0][:, :PROMPT], KV_START, NEW_TOKENS)
    return theirs
