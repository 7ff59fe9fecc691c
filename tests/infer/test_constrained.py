"""Constrained beam search against what transformers 4.55.4 wrote, and prefix_allowed_tokens_fn against 4.57."""

import pytest
from generation_cases import ENDS, FAMILIES, GOLDEN_CASES, PROMPTS, VOCAB, compare_golden, hf_answers, ours

from llm_core.errors import UserError
from llm_core.infer.constraints import Progress, constraints_from

CASES = [name for name, (_, settings) in GOLDEN_CASES.items() if "force_words_ids" in settings]
BEAMS = {"num_beams": 3, "max_new_tokens": 16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_texts_are_those_of_transformers(golden, family, case):
    compare_golden(golden, family, case)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_holds_the_words(family):
    settings = {"num_beams": 8, "max_new_tokens": 24, "force_words_ids": [[60, 61], [[45, 46], [47]]]}
    for answer in ours(family, settings, ENDS):
        text = " ".join(map(str, answer.token_ids))
        assert "60 61" in text
        assert "45 46" in text or "47" in text


def test_words_of_the_prompt_count():
    settings = BEAMS | {"force_words_ids": [PROMPTS[0][1:3]]}
    free = ours("llama", BEAMS, prompts=PROMPTS[:1])
    forced = ours("llama", settings, prompts=PROMPTS[:1])
    assert forced[0].token_ids == free[0].token_ids


def test_progress_through_words():
    begin = Progress(constraints_from([[1, 2], [[3, 4], [3, 5, 6], [7]]]))
    assert begin.next_tokens() == [1, 3, 7]
    assert begin.after(9) == begin
    assert begin.after(1).next_tokens() == [2]
    assert begin.after(1).after(9).next_tokens() == [3, 7, 1]  # lost, and now the last in the queue
    assert begin.after(3).next_tokens() == [4, 5]
    assert begin.after(7).held == 1
    both = begin.after(3).after(5).after(6).after(1).after(2)
    assert both.complete and both.held == 2 and both.after(4) is both
    assert [begin.bank(3), begin.after(1).bank(3), begin.after(3).bank(3), both.bank(3)] == [0, 2, 1, 6]


def test_an_alternative_that_begins_another_is_refused():
    with pytest.raises(UserError, match="begins another"):
        ours("llama", BEAMS | {"force_words_ids": [[[4, 5], [4, 5, 6]]]})


def only_even(number, ids):
    return [token for token in range(VOCAB) if token % 2 == 0] if number != 1 else range(VOCAB)


@pytest.mark.parity
@pytest.mark.parametrize("settings", [{"max_new_tokens": 16}, BEAMS, BEAMS | {"repetition_penalty": 1.3}])
def test_allowed_tokens_are_those_of_transformers(settings):
    pytest.importorskip("torch")
    answers = ours("llama", settings | {"prefix_allowed_tokens_fn": only_even}, ENDS)
    for number, answer in enumerate(answers):
        [(expected, _)] = hf_answers(
            "llama", settings, ENDS, prompts=[PROMPTS[number]],
            prefix_allowed_tokens_fn=lambda _, ids, number=number: list(only_even(number, ids)),
        )  # fmt: skip
        assert answer.token_ids == expected
    assert all(token % 2 == 0 for token in answers[0].token_ids + answers[2].token_ids)


def test_the_function_sees_its_own_text_only():
    seen = []

    def note(number, ids):
        seen.append((number, tuple(ids)))
        return range(VOCAB)

    answers = ours("llama", {"max_new_tokens": 3, "prefix_allowed_tokens_fn": note}, prompts=PROMPTS[:2], rows=4)
    for number, answer in enumerate(answers):
        texts = [tuple(answer.prompt_ids + answer.token_ids[:count]) for count in range(3)]
        assert [ids for found, ids in seen if found == number] == texts
    assert {number for number, _ in seen} == {0, 1}


@pytest.mark.parametrize(
    "allowed, message", [([], "allows no token"), ([VOCAB], f"allows token {VOCAB}"), ([-1], "allows token -1")]
)
def test_what_may_not_be_allowed(allowed, message):
    with pytest.raises(UserError, match=message):
        ours("llama", {"max_new_tokens": 4, "prefix_allowed_tokens_fn": lambda number, ids: allowed})
