"""How well predicted answers match the right ones: EM (exact match) and F1, in two traditions.

- CMRC 2018's, which MindFormers' EmF1Metric follows: text is cut into single Chinese characters and jieba's words;
  F1 is of the longest run of segments that both answers share; a fixed set of punctuation marks is left out, the
  ASCII full stop not among them, so that "the cat." does not match "the cat".
- SQuAD 1.1's official one: answers are lowered and freed of punctuation, articles and extra blanks; F1 is of the
  words in common; the best of all right answers counts.

Scores are in percent. Only strings in, only numbers out.
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

# What CMRC 2018's script leaves out. (It lists "……" too, which no single character equals, so "…" stays.)
CMRC_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CHINESE = re.compile("[\u4e00-\u9fa5]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerScores:
    """Means over `total` questions, in percent."""

    f1: float
    em: float
    total: int


def cmrc_scores(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> AnswerScores:
    """CMRC's EM and F1 of predictions[i] against golds[i] (the best of several counts)."""
    return _mean_of_best(predictions, golds, cmrc_f1, cmrc_em)


def squad_scores(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> AnswerScores:
    """The official SQuAD 1.1 EM and F1 of predictions[i] against golds[i] (the best of several counts)."""
    return _mean_of_best(predictions, golds, squad_f1, squad_em)


def first_line(prediction: str) -> str:
    """What counts of a generated answer, as upstream has it: its first line, without blanks around it."""
    return prediction.strip().split("\n")[0]


def cmrc_f1(prediction: str, gold: str) -> float:
    """F1 of the longest run of segments that both share; 0..1."""
    predicted, right = cmrc_segments(prediction), cmrc_segments(gold)
    run = SequenceMatcher(None, predicted, right, autojunk=False).find_longest_match().size
    return _f1(run, len(predicted), len(right))


def cmrc_em(prediction: str, gold: str) -> float:
    """1.0 if both are the same characters, case and CMRC's punctuation aside."""
    return float(_without_cmrc_punctuation(prediction) == _without_cmrc_punctuation(gold))


def cmrc_segments(text: str) -> list[str]:
    """Single Chinese characters, and jieba's segments of what lies between them; blanks are segments as well."""
    segments: list[str] = []
    between = ""
    for character in _without_cmrc_punctuation(text):
        if _CHINESE.match(character):
            segments += [*_jieba_cut(between), character]
            between = ""
        else:
            between += character
    return segments + _jieba_cut(between)


def squad_f1(prediction: str, gold: str) -> float:
    """F1 of the words in common, each as often as both have it; 0..1."""
    predicted, right = squad_normalize(prediction).split(), squad_normalize(gold).split()
    common = (Counter(predicted) & Counter(right)).total()
    return _f1(common, len(predicted), len(right))


def squad_em(prediction: str, gold: str) -> float:
    """1.0 if both are the same after `squad_normalize`."""
    return float(squad_normalize(prediction) == squad_normalize(gold))


def squad_normalize(text: str) -> str:
    """Lower case; no ASCII punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _mean_of_best(predictions: Sequence[str], golds: Sequence[Sequence[str]], f1, em) -> AnswerScores:
    if not predictions:
        return AnswerScores(0.0, 0.0, 0)
    pairs = list(zip(predictions, golds, strict=True))
    f1_sum = sum(max(f1(prediction, gold) for gold in answers) for prediction, answers in pairs)
    em_sum = sum(max(em(prediction, gold) for gold in answers) for prediction, answers in pairs)
    return AnswerScores(100.0 * f1_sum / len(pairs), 100.0 * em_sum / len(pairs), len(pairs))


def _f1(common: int, predicted: int, right: int) -> float:
    if common == 0:
        return 0.0
    precision, recall = common / predicted, common / right
    return 2 * precision * recall / (precision + recall)


def _without_cmrc_punctuation(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in CMRC_PUNCTUATION)


def _jieba_cut(text: str) -> list[str]:
    """jieba's segments; the warnings of its import and the log lines of its first use are kept back."""
    if not text:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel("ERROR")
    return jieba.lcut(text)
