"""Beam search and beam sample against transformers, each prompt alone there and all in one batch here."""

import numpy as np
import pytest
from generation_cases import (
    ENDS,
    FAMILIES,
    PROMPTS,
    VOCAB,
    generator,
    hf_answers,
    hf_draws_as_ours,
    hf_model,
    ours,
    until_end,
)

from llm_core.errors import UserError
from llm_core.infer import batch
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.scores import ScoreChain, softmax

SEARCHES = [
    ([], {"num_beams": 4, "max_new_tokens": 32}),
    (ENDS[:1], {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 24}),
    (ENDS, {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 24, "early_stopping": True}),
    (ENDS, {"num_beams": 4, "max_new_tokens": 24, "early_stopping": "never", "length_penalty": 2.0}),
    (ENDS, {"num_beams": 4, "max_new_tokens": 24, "early_stopping": "never", "length_penalty": -1.0}),
    (ENDS, {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 24, "length_penalty": 0.0}),
    (
        ENDS,
        {
            "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 24, "min_new_tokens": 6,
            "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11], [2, 3, 4]],
        },
    ),
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ends, settings", SEARCHES)
def test_beams_are_those_of_transformers(family, ends, settings):
    pytest.importorskip("torch")
    answers, expected = ours(family, settings, ends), hf_answers(family, settings, ends)
    assert [answer.token_ids for answer in answers] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([answer.score for answer in answers], [score for _, score in expected], atol=1e-4)


@pytest.mark.parity
def test_lengths_are_counted_from_each_prompt():
    pytest.importorskip("torch")
    settings = {"num_beams": 3, "max_length": 24, "min_length": 12}
    answers, expected = ours("llama", settings, ENDS), hf_answers("llama", settings, ENDS)
    assert [answer.token_ids for answer in answers] == [tokens for tokens, _ in expected]


@pytest.mark.parity
def test_a_padded_batch_there_gives_the_same():
    torch = pytest.importorskip("torch")
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    settings = {"num_beams": 4, "max_new_tokens": 20}
    found = hf_model("llama").generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **settings)
    assert [answer.token_ids for answer in ours("llama", settings)] == found[:, width:].tolist()


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "ends, settings",
    [
        ([], {"num_beams": 3, "temperature": 0.7}),
        (ENDS, {"num_beams": 4, "top_k": 3, "temperature": 1.5, "num_return_sequences": 2}),
        (ENDS[:1], {"num_beams": 2, "top_p": 0.6, "repetition_penalty": 1.2, "early_stopping": True}),
    ],
)
def test_beam_sample_with_the_same_random_numbers(family, ends, settings, monkeypatch):
    """Every step's probabilities within 1e-5 of transformers', and so the same draws and the same answer."""
    torch = pytest.importorskip("torch")
    settings = settings | {"do_sample": True, "max_new_tokens": 16}
    steps, chain = [], ScoreChain.__call__

    def recorded(self, scores, texts):
        steps.append(chain(self, scores, texts))
        return steps[-1]

    monkeypatch.setattr(ScoreChain, "__call__", recorded)
    answers = ours(family, settings, ends, prompts=PROMPTS[:1], seed=3)
    with hf_draws_as_ours(monkeypatch, seed=3):
        ids = torch.tensor(PROMPTS[:1])
        found = hf_model(family).generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, eos_token_id=list(ends) or None,
            return_dict_in_generate=True, output_scores=True, **{"top_k": 0} | settings,
        )  # fmt: skip
    assert len(steps) == len(found.scores) > 2
    for own, theirs in zip(steps, found.scores, strict=True):
        np.testing.assert_allclose(softmax(own), torch.softmax(theirs, -1).numpy(), rtol=0, atol=1e-5)
    expected = [until_end(row, ends) for row in found.sequences[:, ids.shape[1] :].tolist()]
    assert [answer.token_ids for answer in answers] == expected
    np.testing.assert_allclose([answer.score for answer in answers], found.sequences_scores, atol=1e-4)


def test_a_seed_gives_beam_sample_again_alone_and_in_a_batch():
    settings = {"num_beams": 3, "do_sample": True, "max_new_tokens": 12}
    together = ours("llama", settings, seed=11)
    [alone] = ours("llama", settings, prompts=PROMPTS[1:2], seed=12)
    other = ours("llama", settings, seed=50)
    assert alone.token_ids == together[1].token_ids
    assert [answer.token_ids for answer in other] != [answer.token_ids for answer in together]


def test_padding_neighbours_and_idle_rows_change_nothing():
    settings = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 20}
    together = ours("llama", settings, ENDS)
    for number, prompt in enumerate(PROMPTS):
        alone = ours("llama", settings, ENDS, prompts=[prompt], rows=6)
        assert [answer.token_ids for answer in alone] == [
            answer.token_ids for answer in together[2 * number : 2 * number + 2]
        ]
        assert [answer.sequence for answer in alone] == [0, 1]
        assert alone[0].score >= alone[1].score


def test_a_growing_cache_changes_nothing(monkeypatch):
    settings = {"num_beams": 2, "max_new_tokens": 64}
    expected = ours("llama", settings)
    monkeypatch.setattr(batch, "FIRST_CACHE", 64)
    monkeypatch.setattr(batch, "ROOM_BEHIND_PROMPT", 16)
    assert [answer.token_ids for answer in ours("llama", settings)] == [answer.token_ids for answer in expected]


def test_the_best_beam_is_at_least_as_likely_as_the_greedy_answer():
    beams = ours("llama", {"num_beams": 6, "max_new_tokens": 8, "length_penalty": 0.0})
    greedy = ours("llama", {"max_new_tokens": 8})
    for beam, plain in zip(beams, greedy, strict=True):
        assert beam.score >= _log_prob(plain) - 1e-4
        assert beam.score == pytest.approx(_log_prob(beam), abs=1e-4)


def _log_prob(answer) -> float:
    from mindspore import Tensor

    ids = answer.prompt_ids + answer.token_ids
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    logits = generator("llama").net(Tensor(padded)).asnumpy()[0]
    chances = softmax(logits[len(answer.prompt_ids) - 1 : len(ids) - 1].astype(np.float64))
    return float(np.log([row[token] for row, token in zip(chances, answer.token_ids, strict=True)]).sum())


def test_the_caller_cuts_an_answer_when_the_search_is_over():
    settings = {"num_beams": 2, "max_new_tokens": 10}
    whole = ours("llama", settings)
    seen = []

    def cut_the_first(row, token):
        seen.append((row, token))
        return row == 0 and len(seen) == 3

    answers = ours("llama", settings, on_tokens=cut_the_first)
    assert [answer.finish_reason for answer in answers] == ["stop", "length", "length"]
    assert answers[0].token_ids == whole[0].token_ids[:3]
    assert [token for row, token in seen if row == 1] == whole[1].token_ids


def test_an_interruption_keeps_the_best_text_so_far():
    asked = iter([False, False, True])
    answers = ours("llama", {"num_beams": 3, "max_new_tokens": 20}, interrupted=lambda: next(asked))
    assert {answer.finish_reason for answer in answers} == {"interrupted"}
    assert [len(answer.token_ids) for answer in answers] == [3, 3, 3]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "no more answers than beams"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "no multiple"),
        ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty 0"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "num_beam_groups above 1"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, "does not sample"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "early_stopping": "sometimes"}, "never"),
        ({"force_words_ids": [[1]]}, "num_beams"),
        ({"force_words_ids": [[1]], "num_beams": 2, "do_sample": True}, "does not sample"),
        ({"force_words_ids": [[]], "num_beams": 2}, "none empty"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"penalty_alpha": 0.5, "num_beams": 2, "top_k": 4}, "neither samples nor has beams"),
        ({"penalty_alpha": 0.5, "top_k": 4, "do_sample": True}, "neither samples nor has beams"),
        ({"penalty_alpha": 0.5, "top_k": 1}, "set top_k to 2"),
        ({"assistant": object(), "num_beams": 2}, "can be assisted"),
        ({"assistant": object(), "do_sample": True, "num_return_sequences": 2}, "can be assisted"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize("name", ["bad_words_ids", "force_words_ids"])
def test_a_token_that_the_model_lacks_is_refused(name):
    with pytest.raises(UserError, match=f"{name} holds token {VOCAB}"):
        ours("llama", {name: [[VOCAB]], "num_beams": 2, "max_new_tokens": 4})
