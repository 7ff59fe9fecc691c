"""The generator against the plain model: cached, padded, bucketed and batched must change no token."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest

from llm_core.errors import UserError
from llm_core.infer import batch
from llm_core.infer.batch import cache_length, prompt_columns
from llm_core.infer.generate import Generator
from llm_core.infer.sampling import SamplingParams
from llm_core.models.decoder import CausalLM

PROMPTS = [[1, 5, 9], [1, *range(40, 70)], [7]]
GREEDY = SamplingParams(max_new_tokens=64)
DRAWN = SamplingParams(do_sample=True, max_new_tokens=10)


def uncached(net, prompt, count):
    """Greedy search by running the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(net(ms.Tensor(padded)).asnumpy()[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def greedy(generator):
    return generator.generate(PROMPTS, GREEDY)


def test_batched_and_cached_equals_one_by_one_and_uncached(net, greedy):
    for prompt, answer in zip(PROMPTS, greedy, strict=True):
        assert answer.token_ids == uncached(net, prompt, 64)
        assert answer.finish_reason == "length"
        assert len(set(answer.token_ids)) > 10  # the model is not stuck, or the comparison says little


def test_left_padding_changes_nothing(generator, greedy):
    for number in (0, 2):
        [alone] = generator.generate([PROMPTS[number]], GREEDY)
        assert alone.token_ids == greedy[number].token_ids


def test_every_row_has_its_own_angles_beyond_the_trained_length(net, spec):
    """DYNAMIC_NTK: a row's base grows with its own length, not with the longest row's."""
    scaled = replace(spec, rope=replace(spec.rope, method="dynamic_ntk", factor=4.0, original_length=16))
    model = CausalLM(scaled, seed=None).set_train(False)
    weights = net.parameters_dict()
    for name, weight in model.parameters_dict().items():
        weight.set_data(weights[name])
    generator, params = Generator(model, scaled, eos_ids=[], pad_id=0), SamplingParams(max_new_tokens=40)
    together = [answer.token_ids for answer in generator.generate(PROMPTS, params)]
    assert together == [generator.generate([prompt], params)[0].token_ids for prompt in PROMPTS]
    unscaled = Generator(net, spec, eos_ids=[], pad_id=0).generate(PROMPTS, params)
    assert together != [answer.token_ids for answer in unscaled]


def test_a_growing_cache_changes_nothing(net, spec, greedy, monkeypatch):
    monkeypatch.setattr(batch, "FIRST_CACHE", 64)
    monkeypatch.setattr(batch, "ROOM_BEHIND_PROMPT", 16)
    growing = Generator(net, spec, eos_ids=[], pad_id=-1)
    answers = growing.generate(PROMPTS, GREEDY)
    assert sorted(shape.length for shape in growing.decoders.caches) == [64, 96]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in greedy]


def test_caches_that_are_larger_than_the_weights_are_let_go(net, spec, greedy, monkeypatch):
    monkeypatch.setattr(batch, "KEPT_CACHES", 1)
    monkeypatch.setattr(batch, "SMALLEST_CACHE", 1024)
    monkeypatch.setattr(batch, "cache_length", lambda wanted, needed: 1024)
    generator = Generator(net, replace(spec, max_position=4096), eos_ids=[], pad_id=0)
    params = SamplingParams(max_new_tokens=5)
    for rows in (1, 24, 2):
        answers = generator.generate([PROMPTS[1]] * rows, params)
        assert [answer.token_ids for answer in answers] == [greedy[1].token_ids[:5]] * rows
    assert [shape.batch for shape in generator.decoders.caches] == [24, 2]  # 1: too much beside 24
    generator.generate([PROMPTS[1]], params)
    assert [shape.batch for shape in generator.decoders.caches] == [2, 1]


def test_a_prompt_read_in_pieces_changes_nothing(net, spec, greedy, monkeypatch):
    monkeypatch.setattr(batch, "PREFILL_COLUMNS", (16,))
    in_pieces = Generator(net, spec, eos_ids=[], pad_id=0)
    [answer] = in_pieces.generate([PROMPTS[1]], SamplingParams(max_new_tokens=5))
    assert answer.token_ids == greedy[1].token_ids[:5]


def test_idle_rows_and_sampling_change_nothing(generator):
    params = SamplingParams(do_sample=True, top_k=50, max_new_tokens=10)
    together = generator.generate(PROMPTS, params, seed=11)
    [alone] = generator.generate([PROMPTS[1]], params, seed=12, rows=3)
    assert alone.token_ids == together[1].token_ids
    assert alone.seed == together[1].seed == 12


def test_several_sequences_a_prompt_differ(generator):
    params = SamplingParams(do_sample=True, num_return_sequences=3, max_new_tokens=10)
    answers = generator.generate([PROMPTS[0]], params)
    assert [answer.sequence for answer in answers] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    together = generator.generate(PROMPTS, params, seed=4)  # the prompts are read once, and their caches copied
    alone = [generator.generate([prompt], DRAWN, seed=4 + number)[0] for number, prompt in enumerate(PROMPTS)]
    assert [answer.token_ids for answer in together[::3]] == [answer.token_ids for answer in alone]


def test_an_end_token_ends_its_row_only(generator, greedy):
    first = greedy[0].token_ids
    end = next(token for token in first[3:] if token not in first[:3] and token not in greedy[1].token_ids[:20])
    generator.eos_ids = frozenset([end])
    try:
        answers = generator.generate(PROMPTS, SamplingParams(max_new_tokens=20))
        longer = generator.generate(PROMPTS, SamplingParams(max_new_tokens=20, min_new_tokens=15))
    finally:
        generator.eos_ids = frozenset()
    assert answers[0].finish_reason == "eos"
    assert answers[0].token_ids == first[: first.index(end) + 1]
    assert answers[1].token_ids == greedy[1].token_ids[:20]
    assert end not in longer[0].token_ids[:15]


def test_max_length_counts_each_rows_own_prompt(generator):
    answers = generator.generate(PROMPTS, SamplingParams(max_length=40))
    assert [len(answer.token_ids) for answer in answers] == [37, 9, 39]


def test_the_caller_may_end_a_row(generator, greedy):
    seen = []

    def stop_row_one(row, token):
        seen.append((row, token))
        return row == 1 and len([1 for number, _ in seen if number == 1]) == 4

    answers = generator.generate(PROMPTS, SamplingParams(max_new_tokens=6), on_tokens=stop_row_one)
    assert [answer.finish_reason for answer in answers] == ["length", "stop", "length"]
    assert answers[1].token_ids == greedy[1].token_ids[:4]
    assert [token for row, token in seen if row == 2] == greedy[2].token_ids[:6]


def test_an_interruption_keeps_what_was_written(generator, greedy):
    asked = iter([False, False, True])
    answers = generator.generate(PROMPTS, GREEDY, interrupted=lambda: next(asked))
    assert [answer.token_ids for answer in answers] == [answer.token_ids[:3] for answer in greedy]
    assert {answer.finish_reason for answer in answers} == {"interrupted"}


@pytest.mark.parametrize(
    "prompt, message",
    [([], "empty prompt"), ([512], "not belong to this model"), ([1] * 256, "256 tokens"), ([1] * 200, "set max_new")],
)  # fmt: skip
def test_impossible_prompts_are_refused(generator, prompt, message):
    with pytest.raises(UserError, match=message):
        generator.generate([prompt], GREEDY)


def test_buckets():
    assert [prompt_columns(n) for n in (1, 16, 17, 256)] == [(16, 16), (16, 16), (32, 32), (256, 256)]
    assert prompt_columns(257) == (512, 256)
    assert cache_length(10, 10) == 64
    assert cache_length(300, 300) == 512
    assert cache_length(512, 4000) == 512
    assert cache_length(524, 524) == 768
    assert cache_length(1024, 4000) == 1024
    assert cache_length(4096, 4000) == 4096


@pytest.mark.parity
@pytest.mark.parametrize("kv_heads, tied", [(2, False), (4, True)])
def test_greedy_tokens_are_those_of_transformers(spec, kv_heads, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dataclasses import replace

    from llm_core.checkpoint.hf import from_hf
    from llm_core.checkpoint.weights import load_into
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=64, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.3,
        rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    spec = replace(spec, num_kv_heads=kv_heads, tied_head=tied)
    ours = CausalLM(spec, seed=None)
    weights = {from_hf(name): value.numpy() for name, value in theirs.state_dict().items()}
    load_into(ours, weights)
    answers = Generator(ours, spec, eos_ids=[], pad_id=0).generate(PROMPTS, GREEDY)
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        assert answer.token_ids == expected[0, len(answer.prompt_ids) :].tolist()
