"""Diverse (group) beam search against what transformers 4.55.4, the last that has it, wrote."""

import pytest
from generation_cases import ENDS, FAMILIES, GOLDEN_CASES, PROMPTS, compare_golden, ours

CASES = [name for name in GOLDEN_CASES if name.startswith("group")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_groups_are_those_of_transformers(golden, family, case):
    compare_golden(golden, family, case)


def test_groups_differ_where_beams_would_not():
    settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12}
    beams = ours("llama", settings, prompts=PROMPTS[:1])
    groups = ours("llama", settings | {"num_beam_groups": 4, "diversity_penalty": 5.0}, prompts=PROMPTS[:1])
    assert len({answer.token_ids[0] for answer in groups}) == 4 > len({answer.token_ids[0] for answer in beams})


def test_an_interruption_keeps_the_best_text_so_far():
    settings = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "max_new_tokens": 12}
    whole = ours("llama", settings | {"max_new_tokens": 2}, ENDS)
    asked = iter([False, True])
    answers = ours("llama", settings, ENDS, interrupted=lambda: next(asked))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in whole]
