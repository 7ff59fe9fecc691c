"""EM and F1 against values worked out by hand."""

import pytest

from llm_core.evals import squad


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "em"),
    [
        ("the cat.", "the cat", 6 / 7, 0.0),  # segments: the, blank, cat, "." against the first three
        ("Hello world。", "hello world", 1.0, 1.0),  # the Chinese full stop and case do not count
        ("郑州市。", "郑州市", 1.0, 1.0),
        ("郑州", "郑州市", 0.8, 0.0),  # 2 of 2 and 2 of 3 characters
        ("市郑州", "郑州市", 2 / 3, 0.0),  # the longest run in common is 郑州
        ("甲乙丙丁", "甲丙乙丁", 0.25, 0.0),  # a run must be contiguous: 1 of 4 (a subsequence would have 3)
        ("x-y", "xy", 1.0, 1.0),  # the hyphen is left out before cutting
        ("苹果 apple", "apple", 2 / 5, 0.0),  # 苹, 果, blank, apple against apple
        ("", "cat", 0.0, 0.0),
        ("a", "b", 0.0, 0.0),
    ],
)
def test_cmrc(prediction, gold, f1, em):
    assert squad.cmrc_f1(prediction, gold) == pytest.approx(f1, abs=1e-12)
    assert squad.cmrc_em(prediction, gold) == em


def test_cmrc_segments_of_mixed_text():
    # the hyphen and the comma are gone before jieba sees the rest
    assert squad.cmrc_segments("我爱 The-Cat，2024 It\'s") == ["我", "爱", " ", "thecat2024", " ", "it", "\'", "s"]


@pytest.mark.parametrize(
    ("prediction", "gold", "f1", "em"),
    [
        ("The cat.", "cat", 1.0, 1.0),  # article, case and full stop do not count
        ("a an the", "", 0.0, 1.0),  # nothing is left of either: equal, but without a common word
        ("denver broncos team", "Denver Broncos", 0.8, 0.0),  # 2 of 3 and 2 of 2 words
        ("to to be", "to be be", 2 / 3, 0.0),  # repeated words count as often as both have them
        ("theatre", "atre", 0.0, 0.0),  # an article inside a word stays
        ("U.S.A.", "USA", 1.0, 1.0),
        ("well-known", "well known", 0.0, 0.0),  # punctuation goes without leaving a blank
    ],
)
def test_squad(prediction, gold, f1, em):
    assert squad.squad_f1(prediction, gold) == pytest.approx(f1, abs=1e-12)
    assert squad.squad_em(prediction, gold) == em


def test_the_best_of_all_right_answers_counts():
    golds = [["Santa Clara", "Santa Clara, California"], ["1066"]]
    scores = squad.squad_scores(["santa clara california", "in 1067"], golds)
    assert scores == squad.AnswerScores(f1=50.0, em=50.0, total=2)


def test_means_are_in_percent():
    scores = squad.cmrc_scores(["郑州市", "郑州", "上海"], [["郑州市"], ["郑州市"], ["北京"]])
    assert scores.total == 3
    assert scores.em == pytest.approx(100 / 3)
    assert scores.f1 == pytest.approx(100 * 1.8 / 3)
    assert squad.cmrc_scores([], []) == squad.AnswerScores(0.0, 0.0, 0)


def test_predictions_without_answers_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError):
        squad.squad_scores(["a", "b"], [["a"]])


def test_first_line_of_an_answer():
    assert squad.first_line("\n  Paris \nis the capital") == "Paris "
    assert squad.first_line("") == ""


def test_jieba_is_silent(capfd):
    squad.cmrc_segments("quiet please")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
