"""Contrastive search against what transformers 4.55.4, the last that has it, wrote."""

import numpy as np
import pytest
from generation_cases import ENDS, FAMILIES, GOLDEN_CASES, PROMPTS, VOCAB, compare_golden, generator, ours

from llm_core.infer import batch
from llm_core.infer.scores import softmax

CASES = [name for name in GOLDEN_CASES if name.startswith("contrastive")]
SETTINGS = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 24}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(golden, family, case):
    compare_golden(golden, family, case)


def test_cached_equals_the_formula_on_the_whole_text():
    """Each step again, without cache or batch: hidden states and probabilities from the plain model."""
    [answer] = ours("llama", SETTINGS | {"max_new_tokens": 6}, prompts=PROMPTS[:1])
    text = list(PROMPTS[0])
    for token in answer.token_ids:
        hidden, logits = _read(text)
        chances = softmax(logits[len(text) - 1])
        values = {}
        for candidate in np.argsort(-chances)[:4].tolist():
            with_it, _ = _read([*text, candidate])
            likeness = max(_cosine(with_it[len(text)], hidden[place]) for place in range(len(text)))
            values[candidate] = 0.4 * chances[candidate] - 0.6 * likeness
        assert max(values, key=values.get) == token
        text.append(token)


def _read(ids):
    from mindspore import Tensor

    net = generator("llama").net
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(ids)] = ids
    return net.model(Tensor(padded)).asnumpy(), net(Tensor(padded)).asnumpy()[0]


def _cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_growing_cache_and_prompts_read_in_pieces_change_nothing(monkeypatch):
    settings = SETTINGS | {"max_new_tokens": 64}
    expected = ours("falcon", settings, ENDS[:1])
    monkeypatch.setattr(batch, "PREFILL_COLUMNS", (16,))
    monkeypatch.setattr(batch, "FIRST_CACHE", 64)
    monkeypatch.setattr(batch, "ROOM_BEHIND_PROMPT", 16)
    answers = ours("falcon", settings, ENDS[:1])
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


def test_neighbours_change_nothing_and_tokens_come_as_they_are_chosen():
    together = ours("llama", SETTINGS)
    seen = []
    [alone] = ours("llama", SETTINGS, prompts=PROMPTS[2:], on_tokens=lambda row, token: seen.append(token))
    assert alone.token_ids == together[2].token_ids == seen


def test_more_candidates_than_tokens_are_all_tokens():
    every = {"max_new_tokens": 3, "penalty_alpha": 0.6}
    beyond = ours("llama", every | {"top_k": 10 * VOCAB}, prompts=PROMPTS[:1])
    assert [a.token_ids for a in beyond] == [
        a.token_ids for a in ours("llama", every | {"top_k": VOCAB}, prompts=PROMPTS[:1])
    ]


def test_no_penalty_is_greedy_search():
    almost = ours("llama", SETTINGS | {"penalty_alpha": 1e-6})
    greedy = ours("llama", {"max_new_tokens": 24})
    assert [answer.token_ids for answer in almost] == [answer.token_ids for answer in greedy]
