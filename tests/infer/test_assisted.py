"""Assisted (speculative) generation: the model's own tokens, or its own distribution, whatever is guessed."""

from dataclasses import replace

import numpy as np
import pytest
from generation_cases import ENDS, PROMPTS, SPECS, VOCAB, generator, hf_model, ours, until_end

from llm_core.errors import UserError
from llm_core.infer import assisted, batch
from llm_core.infer.assisted import check_by_chance, check_greedily
from llm_core.infer.generate import Generator
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.scores import random_stream
from llm_core.models.spec import RopeSpec

GREEDY = {"max_new_tokens": 40}


def assisted_settings(**settings) -> dict:
    return GREEDY | {"assistant": generator("small")} | settings


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("guessed", [1, 5])
def test_greedy_tokens_are_the_models_own(family, guessed):
    """The small Llama shares some weights with the large one; to the Falcon it is a stranger."""
    plain = ours(family, GREEDY, ENDS)
    answers = ours(family, assisted_settings(num_assistant_tokens=guessed), ENDS)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    assert [answer.finish_reason for answer in answers] == [answer.finish_reason for answer in plain]


def test_a_perfect_assistant_is_followed(monkeypatch):
    """Then each reading of the model brings all guesses and one token more."""
    checks = []

    def counted(scores, guesses):
        checks.append((len(guesses), len(check_greedily(scores, guesses))))
        return check_greedily(scores, guesses)

    monkeypatch.setattr(assisted, "check_greedily", counted)
    twin = Generator(generator("llama").net, SPECS["llama"], eos_ids=[], pad_id=0)
    [answer] = ours("llama", assisted_settings(assistant=twin, num_assistant_tokens=4), prompts=PROMPTS[:1])
    assert answer.token_ids == ours("llama", GREEDY, prompts=PROMPTS[:1])[0].token_ids
    assert all(found == guessed + 1 for guessed, found in checks)
    assert len(checks) == 8  # 1 token + 7 x 5 + 4 = 40


@pytest.mark.parity
@pytest.mark.parametrize(
    "ends, settings", [([], {}), (ENDS, {}), (ENDS, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2})]
)
def test_greedy_tokens_are_those_of_transformers(ends, settings):
    torch = pytest.importorskip("torch")
    answers = ours("llama", assisted_settings(**settings), ends)
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids])
        found = hf_model("llama").generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=hf_model("small"), do_sample=False,
            pad_token_id=0, eos_token_id=list(ends) or None, **GREEDY, **settings,
        )  # fmt: skip
        assert answer.token_ids == until_end(found[0, ids.shape[1] :].tolist(), ends)


def test_processors_growing_caches_and_settings_change_nothing(monkeypatch):
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 10, "max_new_tokens": 64}
    expected = ours("llama", settings, ENDS)
    assert [a.token_ids for a in ours("llama", assisted_settings(**settings), ENDS)] == [a.token_ids for a in expected]
    monkeypatch.setattr(batch, "FIRST_CACHE", 64)
    monkeypatch.setattr(batch, "ROOM_BEHIND_PROMPT", 16)
    assert [a.token_ids for a in ours("llama", assisted_settings(**settings), ENDS)] == [a.token_ids for a in expected]


def chances(seed: int, rows: int, vocab: int = VOCAB, sparse: bool = False) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(0, 2, (rows, vocab))
    if sparse:  # as top_k leaves them
        scores[scores < np.sort(scores, -1)[:, -5, None]] = -np.inf
    weights = np.exp(scores)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_first_token_is_distributed_as_the_models_own(sparse):
    """Summed over all guesses: kept with its chance, or replaced. No sampling, the formula's own weights."""
    wanted, guessed = chances(1, 2, sparse=sparse), chances(2, 1, sparse=sparse)
    total = np.zeros(VOCAB)
    for guess in np.flatnonzero(guessed[0]):
        kept = _kept_share(wanted, guessed, guess)
        total[guess] += guessed[0, guess] * kept
        if kept < 1:
            total += guessed[0, guess] * (1 - kept) * _replacement(wanted, guessed, guess)
    np.testing.assert_allclose(total, wanted[0], atol=2e-3)


class _Fixed:
    """A random stream of given numbers."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def _kept_share(wanted, guessed, guess) -> float:
    """The share of random numbers with which the guess is kept, by halving."""
    low, high = 0.0, 1.0
    if check_by_chance(wanted, guessed, [guess], _Fixed(1 - 1e-12, 0.5))[0] == guess:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if len(check_by_chance(wanted, guessed, [guess], _Fixed(middle, 0.5))) == 2:
            low = middle
        else:
            high = middle
    return low


def _replacement(wanted, guessed, guess, steps: int = 2000) -> np.ndarray:
    """The distribution of what comes instead of a guess that is not kept."""
    drawn = [
        check_by_chance(wanted, guessed, [guess], _Fixed(1 - 1e-12, (step + 0.5) / steps))[0] for step in range(steps)
    ]
    return np.bincount(drawn, minlength=VOCAB) / steps


@pytest.mark.parity
def test_what_is_kept_is_what_transformers_keeps(monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers.generation.utils import _speculative_sampling

    for seed in range(20):
        wanted, guessed = chances(seed, 5, sparse=seed % 2 == 1), chances(100 + seed, 4, sparse=seed % 2 == 1)
        if seed % 3 == 0:
            guessed = 0.1 * guessed + 0.9 * wanted[:4]  # an assistant that is often right
        random = random_stream(seed, 0)
        guesses = [int(random.choice(VOCAB, p=row)) for row in guessed]
        numbers = np.random.default_rng(seed).random(5)
        replaced = []

        def choose_first(weights, num_samples, replaced=replaced):
            replaced.append(weights.numpy()[0])
            return weights.argmax(-1, keepdim=True)

        monkeypatch.setattr(torch, "rand_like", lambda like, numbers=numbers: torch.tensor(numbers[:4]))
        monkeypatch.setattr(torch, "multinomial", choose_first)
        logits = [torch.from_numpy(np.log(np.maximum(array, 1e-300))[None]) for array in (guessed, wanted)]
        ids = torch.tensor([guesses])
        tokens, matches = _speculative_sampling(ids, logits[0], 4, logits[1], False)
        kept = check_by_chance(wanted, guessed, guesses, _Fixed(*numbers))
        assert kept[:-1] == tokens[0, :-1].tolist() and len(kept) == int(matches) + 1
        assert replaced[0][kept[-1]] > 0


def test_sampling_is_repeatable_and_depends_on_the_seed():
    settings = assisted_settings(do_sample=True, top_k=20, max_new_tokens=12)
    together = ours("llama", settings, seed=5)
    [alone] = ours("llama", settings, prompts=PROMPTS[1:2], seed=6)
    assert alone.token_ids == together[1].token_ids
    assert ours("llama", settings, seed=7)[0].token_ids != together[0].token_ids


def test_sampled_tokens_follow_the_models_own_probabilities():
    """The first three tokens of many answers, counted, against plain sampling's."""
    settings = {"do_sample": True, "top_k": 3, "max_new_tokens": 3}
    helped = assisted_settings(**settings, num_assistant_tokens=2)
    prompt, runs = PROMPTS[:1], 300
    counts = [{}, {}]
    for count, wanted in zip(counts, (settings, helped), strict=True):
        for answer in ours("llama", wanted, prompts=prompt * runs):
            count[tuple(answer.token_ids)] = count.get(tuple(answer.token_ids), 0) + 1 / runs
    distance = sum(abs(counts[0].get(text, 0) - counts[1].get(text, 0)) for text in set(counts[0]) | set(counts[1])) / 2
    assert distance < 0.2


def test_the_caller_sees_tokens_as_they_are_kept_and_may_stop():
    seen = []

    def stop_after_four(row, token):
        seen.append((row, token))
        return row == 0 and len(seen) == 4

    answers = ours("llama", assisted_settings(), prompts=PROMPTS[:2], on_tokens=stop_after_four)
    assert [answer.finish_reason for answer in answers] == ["stop", "length"]
    assert [token for row, token in seen if row == 0] == answers[0].token_ids


def test_an_interruption_keeps_what_was_written():
    asked = iter([False, False, False, *[True] * 10])
    answers = ours("llama", assisted_settings(), interrupted=lambda: next(asked))
    assert 2 <= len(answers[0].token_ids) < 40
    assert [answer.finish_reason for answer in answers] == ["interrupted"] * 3
    assert answers[1].token_ids == answers[2].token_ids == []


def test_a_prompt_beyond_the_assistants_context_is_answered_without_it():
    short = generator("small")
    short = Generator(short.net, replace(short.spec, max_position=len(PROMPTS[0])), eos_ids=[], pad_id=0)
    plain = ours("llama", GREEDY)
    answers = ours("llama", GREEDY | {"assistant": short})
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]


def test_an_assistant_that_does_not_fit_is_refused(net, spec):
    stranger = Generator(net, spec, eos_ids=[], pad_id=0)  # 512 tokens
    with pytest.raises(UserError, match="512 tokens"):
        ours("llama", GREEDY | {"assistant": stranger})
    with pytest.raises(UserError, match="the model itself"):
        ours("llama", GREEDY | {"assistant": generator("llama")})
    scaled = replace(SPECS["llama"], rope=RopeSpec(method="dynamic_ntk", factor=2.0))
    model = Generator(generator("llama").net, scaled, eos_ids=[], pad_id=0)
    with pytest.raises(UserError, match="DYNAMIC_NTK"):
        model.generate(PROMPTS, SamplingParams(max_new_tokens=4, assistant=generator("small")))
