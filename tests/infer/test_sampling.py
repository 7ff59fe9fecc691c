"""Choosing a token: against hand-computed cases, and against transformers' own processors."""

import numpy as np
import pytest

from llm_core.errors import UserError
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.scores import (
    Sampler,
    ScoreChain,
    Text,
    ends_of_bad_words,
    ends_of_seen_ngrams,
    keep_top_k,
    keep_top_p,
    softmax,
)

NEVER = -np.inf


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_text_that_nothing_may_follow_is_an_error(do_sample):
    """Only the end is allowed, and it is too early for the end."""
    params = SamplingParams(do_sample=do_sample, min_new_tokens=3, prefix_allowed_tokens_fn=lambda number, ids: [2])
    with pytest.raises(UserError, match="every token is forbidden behind"):
        sampler_for([[0, 1]], params, eos_ids=[2]).choose(np.zeros((1, 4), np.float32), [0])


def sampler_for(prompts, params, eos_ids=(), seed=0, streams=None):
    texts = [Text(list(map(int, prompt)), len(prompt), number) for number, prompt in enumerate(prompts)]
    return Sampler(texts, ScoreChain(params, eos_ids), streams or [(seed + row, 0) for row in range(len(prompts))])


def chosen(sampler, logits):
    return sampler.choose(logits, range(len(logits)))


def random_logits(rows, vocab=50, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def test_top_k_keeps_the_k_best_and_their_equals():
    scores = np.array([[1, 5, 3, 3, 0]], np.float32)
    assert keep_top_k(scores, 2).tolist() == [[NEVER, 5, 3, 3, NEVER]]
    assert keep_top_k(scores, 99).tolist() == scores.tolist()


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    scores = np.log(np.array([[0.1, 0.45, 0.2, 0.25]], np.float32))
    assert (keep_top_p(scores, 0.4) > NEVER).tolist() == [[False, True, False, False]]
    assert (keep_top_p(scores, 0.6) > NEVER).tolist() == [[False, True, False, True]]
    assert (keep_top_p(scores, 0.0) > NEVER).tolist() == [[False, True, False, False]]


def test_top_p_cuts_between_equal_scores():
    kept = keep_top_p(np.zeros((1, 4), np.float32), 0.5)
    assert (kept > NEVER).sum() == 2


def test_temperature_zero_is_greedy():
    logits = random_logits(3)
    params = SamplingParams(do_sample=True, temperature=0)
    assert chosen(sampler_for([[1]] * 3, params), logits).tolist() == logits.argmax(-1).tolist()


def test_draws_follow_the_distribution():
    logits = np.log(np.array([[0.1, 0.6, 0.3]], np.float32))
    sampler = sampler_for([[0]], SamplingParams(do_sample=True))
    counts = np.bincount([int(chosen(sampler, logits)[0]) for _ in range(20_000)], minlength=3) / 20_000
    assert np.abs(counts - [0.1, 0.6, 0.3]).max() < 0.015


def test_an_impossible_token_is_never_drawn():
    logits = np.full((1, 6), NEVER, np.float32)
    logits[0, 4] = 0
    sampler = sampler_for([[0]], SamplingParams(do_sample=True))
    assert {int(chosen(sampler, logits)[0]) for _ in range(50)} == {4}


def test_a_row_draws_the_same_alone_and_in_a_batch():
    params = SamplingParams(do_sample=True, top_k=20, repetition_penalty=1.3)
    logits = random_logits(4)
    together = sampler_for([[1], [2], [3], [4]], params, seed=7)
    alone = sampler_for([[3]], params, seed=7 + 2)
    for _ in range(5):
        assert chosen(together, logits)[2] == chosen(alone, logits[2:3])[0]


def test_seeds_and_sequences_give_different_streams():
    params = SamplingParams(do_sample=True)
    sampler = sampler_for([[1]] * 3, params, streams=[(0, 0), (0, 1), (1, 0)])
    logits = np.zeros((3, 1000), np.float32)
    draws = np.stack([chosen(sampler, logits) for _ in range(8)], 1)
    assert len({tuple(row) for row in draws}) == 3


def test_repetition_penalty_counts_prompt_and_answer():
    params = SamplingParams(repetition_penalty=2.0)
    sampler = sampler_for([[0]], params)
    logits = np.array([[4, 3, 1.9]], np.float32)
    assert [int(chosen(sampler, logits)[0]) for _ in range(3)] == [1, 0, 0]  # 3 | 2, 1.5, 1.9 -> 0 keeps 2


def test_ends_are_impossible_until_the_shortest_length():
    logits = np.array([[0, 1, 9]], np.float32)
    sampler = sampler_for([[0, 0]], SamplingParams(min_length=4), eos_ids=[2])
    assert [int(chosen(sampler, logits)[0]) for _ in range(3)] == [1, 1, 2]
    sampler = sampler_for([[0, 0]], SamplingParams(min_new_tokens=1), eos_ids=[2])
    assert [int(chosen(sampler, logits)[0]) for _ in range(2)] == [1, 2]
    both = SamplingParams(min_length=9, min_new_tokens=1)  # the latter wins, as in transformers
    sampler = sampler_for([[0, 0]], both, eos_ids=[2])
    assert [int(chosen(sampler, logits)[0]) for _ in range(2)] == [1, 2]


def test_no_run_of_tokens_stands_twice():
    assert ends_of_seen_ngrams([1, 2, 3, 1, 2, 4, 1, 2], 3) == [3, 4]
    assert ends_of_seen_ngrams([1, 2, 3], 1) == [1, 2, 3]
    assert ends_of_seen_ngrams([1], 3) == ends_of_seen_ngrams([1, 1], 3) == []
    sampler = sampler_for([[0]], SamplingParams(no_repeat_ngram_size=1))
    assert [int(chosen(sampler, np.array([[9, 8, 7, 6]], np.float32))[0]) for _ in range(3)] == [1, 2, 3]


def test_bad_words_are_not_written():
    assert ends_of_bad_words([4, 5], [[7], [5, 8], [4, 9], [4, 5, 6], [2]], [2]) == [7, 8]
    assert ends_of_bad_words([1, 4, 5], [[4, 5, 6]], []) == [6]


def test_not_a_number_is_reported():
    with pytest.raises(UserError, match="NaN"):
        chosen(sampler_for([[0]], SamplingParams()), np.array([[np.nan, 1]], np.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1}, {"top_k": -1}, {"top_p": 1.5}, {"repetition_penalty": 0}, {"max_new_tokens": 0},
        {"num_return_sequences": 2}, {"stop_strings": ("",)},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_how_many_tokens_may_be_written():
    assert SamplingParams(max_new_tokens=5, max_length=3).new_tokens(10, 100) == 5
    assert SamplingParams(max_length=30).new_tokens(10, 100) == 20
    assert SamplingParams(max_length=512).new_tokens(10, 100) == 90
    assert SamplingParams().new_tokens(10, 100) == 90
    with pytest.raises(UserError, match="set max_new_tokens to 90 or less"):
        SamplingParams(max_new_tokens=91).new_tokens(10, 100)
    with pytest.raises(UserError, match="counts prompt and answer"):
        SamplingParams(max_length=10).new_tokens(10, 100)
    with pytest.raises(UserError, match="shorten the prompt"):
        SamplingParams().new_tokens(100, 100)


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.3, "temperature": 1.7},
        {"repetition_penalty": 1.4},
        {"min_length": 9},
        {"min_new_tokens": 3},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [3]]},
        {"num_beams": 3, "top_k": 1},
        {"num_beams": 3, "top_p": 0.01},
        {"repetition_penalty": 0.8, "min_new_tokens": 2, "temperature": 0.6, "top_k": 30, "top_p": 0.9},
    ],
)
def test_probabilities_are_those_of_transformers(settings):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    prompts = np.random.default_rng(1).integers(0, 200, (4, 6))
    config = transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    config._eos_token_tensor = torch.tensor([3, 7])
    processors = transformers.GenerationMixin()._get_logits_processor(config, input_ids_seq_length=6, device="cpu")
    sampler = sampler_for(prompts, SamplingParams(do_sample=True, **settings), eos_ids=[3, 7])

    ids = torch.tensor(prompts)
    for step in range(5):
        logits = random_logits(4, 200, seed=step)
        theirs = torch.softmax(processors(ids, torch.tensor(logits)), -1).numpy()
        np.testing.assert_allclose(softmax(sampler.chain(logits, sampler.texts)), theirs, rtol=0, atol=1e-6)
        ids = torch.cat([ids, torch.tensor(chosen(sampler, logits))[:, None]], -1)
