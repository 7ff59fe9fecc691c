"""Tiny models, prompts and settings of the generation tests, and what HF transformers makes of them.

Used by the tests and by tools/make_golden.py; only the functions named hf_* need torch. What transformers 4.57 no
longer generates (GOLDEN_CASES) was written by 4.55.4 into tests/golden/generation.npz.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from llm_core.checkpoint.hf import to_hf
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec

VOCAB = 64
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6], [17]]
ENDS = [5, 17, 33]
_SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, head_dim=8, max_position=256)
SPECS = {
    "llama": DecoderSpec(**_SIZES, num_kv_heads=2, ffn_size=48),
    "falcon": DecoderSpec(  # multi-query, ALiBi, parallel layers
        **_SIZES, num_kv_heads=1, ffn_size=128, norm="layer", residual="parallel", position="alibi", mlp="gelu",
        tied_head=True,
    ),
    "small": DecoderSpec(**_SIZES | {"num_layers": 1}, num_kv_heads=2, ffn_size=48),  # an assistant
}  # fmt: skip
FAMILIES = ("llama", "falcon")

_GROUPS = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7, "max_new_tokens": 16}
_CONSTRAINED = {"num_beams": 4, "max_new_tokens": 16}
# name -> (ends of text, settings); run for both families
GOLDEN_CASES: dict[str, tuple[list[int], dict]] = {
    "group": ([], _GROUPS | {"num_return_sequences": 6}),
    "group_ends": (ENDS[:1], _GROUPS | {"num_return_sequences": 3, "early_stopping": True}),
    "group_many_ends": (ENDS, _GROUPS | {"num_return_sequences": 4, "length_penalty": -0.5}),
    "group_never": (ENDS, _GROUPS | {"early_stopping": "never", "length_penalty": 1.5, "repetition_penalty": 1.3}),
    "contrastive": ([], {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 32}),
    "contrastive_ends": (
        ENDS, {"penalty_alpha": 0.3, "top_k": 6, "max_new_tokens": 32, "min_new_tokens": 6, "repetition_penalty": 1.2},
    ),
    "word": ([], _CONSTRAINED | {"force_words_ids": [[40, 41]]}),
    "words": (ENDS, _CONSTRAINED | {"force_words_ids": [[40, 41, 42], [50]], "num_return_sequences": 2}),
    "alternatives": (ENDS[:1], _CONSTRAINED | {"force_words_ids": [[[40, 41, 42], [40, 43], [44]], [51, 52]]}),
    "impossible": (ENDS, _CONSTRAINED | {"force_words_ids": [list(range(40, 60))], "num_return_sequences": 4}),
    "words_never": (
        ENDS, _CONSTRAINED | {
            "force_words_ids": [[50, 51], [50, 52]], "early_stopping": "never", "length_penalty": 0.4,
        },
    ),
}  # fmt: skip


def weights(name: str) -> dict[str, np.ndarray]:
    """The fixed weights of a model, by MindFormers' names: wide enough that the next token is never a close call."""
    values = {}
    for parameter, shape in parameter_shapes(SPECS[name]).items():
        normal = np.random.RandomState(zlib.crc32(parameter.encode())).standard_normal(shape)
        scale = "norm" in parameter and parameter.endswith("weight")
        values[parameter] = (1 + 0.2 * normal if scale else 0.3 * normal).astype(np.float32)
    return values


@cache
def generator(name: str):
    """Our side, one for all tests, so that each graph is compiled once. Its `eos_ids` are a test's to set."""
    from mindspore import Tensor

    from llm_core.infer.generate import Generator
    from llm_core.models.decoder import CausalLM

    net = CausalLM(SPECS[name], seed=None)
    parameters = net.parameters_dict()
    for parameter, value in weights(name).items():
        parameters[parameter].set_data(Tensor(value))
    return Generator(net.set_train(False), SPECS[name], eos_ids=[], pad_id=0)


def ours(name: str, settings: dict, ends: list[int] = (), prompts=PROMPTS, seed: int = 0, **arguments):
    """Our answers: a list of Generations."""
    from llm_core.infer.sampling import SamplingParams

    model = generator(name)
    model.eos_ids = frozenset(ends)
    return model.generate(prompts, SamplingParams(**settings), seed, **arguments)


@cache
def hf_model(name: str):
    """HF's model with the same weights, fp32, in eval mode."""
    import torch
    import transformers

    spec = SPECS[name]
    common = dict(
        vocab_size=VOCAB, hidden_size=spec.hidden_size, num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    family = "falcon" if name == "falcon" else "llama"
    if family == "falcon":
        config = transformers.FalconConfig(
            **common, alibi=True, multi_query=True, parallel_attn=True, bias=False, new_decoder_architecture=False
        )
        model = transformers.FalconForCausalLM(config)
    else:
        config = transformers.LlamaConfig(
            **common, num_key_value_heads=spec.num_kv_heads, intermediate_size=spec.ffn_size, rms_norm_eps=1e-5,
            max_position_embeddings=spec.max_position, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    parts: dict[str, list[np.ndarray]] = {}
    for parameter, value in weights(name).items():  # query, key and value in this order, which is multi-query's in HF
        parts.setdefault(to_hf(parameter, family), []).append(value)
    values = {parameter: torch.from_numpy(np.concatenate(value)) for parameter, value in parts.items()}
    report = model.load_state_dict(values, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}
    return model.eval()


def hf_answers(name: str, settings: dict, ends: list[int] = (), prompts=PROMPTS, **arguments) -> list[tuple]:
    """HF's answers to each prompt alone: (new tokens up to the first end, score or None), as `ours`."""
    import torch

    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = hf_model(name).generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=list(ends) or None,
            return_dict_in_generate=True, output_scores=True, **{"do_sample": False} | settings, **arguments,
        )  # fmt: skip
        scores = getattr(found, "sequences_scores", None)
        for row, sequence in enumerate(found.sequences[:, len(prompt) :].tolist()):
            answers.append((until_end(sequence, ends), None if scores is None else float(scores[row])))
    return answers


def until_end(tokens: list[int], ends) -> list[int]:
    """The tokens up to the first end, that included."""
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: place + 1]


def hf_golden() -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of the golden file; needs transformers 4.55.4."""
    for family in FAMILIES:
        for case, (ends, settings) in GOLDEN_CASES.items():
            answers = hf_answers(family, settings, ends)
            padded = np.full((len(answers), settings["max_new_tokens"]), -1, np.int8)
            for row, (tokens, _) in zip(padded, answers, strict=True):
                row[: len(tokens)] = tokens
            yield f"{family}/{case}/tokens", padded
            if answers[0][1] is not None:
                yield f"{family}/{case}/scores", np.array([score for _, score in answers], np.float32)


def compare_golden(golden, family: str, case: str) -> None:
    """Assert that our answers to all prompts in one batch are those that HF gave to each alone."""
    ends, settings = GOLDEN_CASES[case]
    answers = ours(family, settings, ends)
    tokens = golden[f"{family}/{case}/tokens"]
    for answer, expected in zip(answers, tokens, strict=True):
        assert same_tokens(answer.token_ids, expected[expected >= 0].tolist(), ends)
    if f"{family}/{case}/scores" in golden:
        scores = golden[f"{family}/{case}/scores"]
        np.testing.assert_allclose([answer.score for answer in answers], scores, atol=1e-4)


def same_tokens(found: list[int], expected: list[int], ends) -> bool:
    """Whether the tokens are equal; transformers 4.55 writes the first of several ends where any has come."""
    if found and expected and found[-1] in ends and expected[-1] in ends:
        found, expected = found[:-1], expected[:-1]
    return found == expected


@contextmanager
def hf_draws_as_ours(monkeypatch, seed: int) -> Iterator[None]:
    """Within this block torch.multinomial draws with the random numbers of our answer with that seed."""
    import torch

    from llm_core.infer.scores import random_stream

    random = random_stream(seed, 0)

    def multinomial(weights, num_samples):
        order = weights.double() / torch.from_numpy(random.standard_exponential(weights.shape[-1]))
        return torch.topk(order, num_samples, dim=-1).indices

    with monkeypatch.context() as patched:
        patched.setattr(torch, "multinomial", multinomial)
        yield
