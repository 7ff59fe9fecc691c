"""MMLU and CMMLU as questions and prompts: no MindSpore.

The prompts are those of EleutherAI's lm-evaluation-harness (tasks mmlu and cmmlu):

    The following are multiple choice questions (with answers) about SUBJECT.

    QUESTION
    A. ...            for each of the shots, with " B" behind "Answer:", and for the question itself, without
    B. ...
    C. ...
    D. ...
    Answer:
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_core.data.choices import LETTERS, ChoiceQuestion, read_choice_folder
from llm_core.errors import UserError
from llm_core.evals.subjects import CHINESE_NAMES

# A letter by itself; "A" before a small letter is the article ("A cat"), except before a word no article stands before
_NO_NOUN = r"(?:is|was|because|since|as|and|or|but)\b"
_LETTER = re.compile(rf"(?<![A-Za-z0-9])(?:A(?! (?!{_NO_NOUN})[a-z])|[BCD])(?![A-Za-z0-9])")


@dataclass(frozen=True)
class ChoiceData:
    """What is asked: the questions by subject, and the examples that may stand before them, by subject."""

    questions: dict[str, list[ChoiceQuestion]]
    examples: dict[str, list[ChoiceQuestion]]
    chinese: bool


def read_choice_data(section: Any) -> ChoiceData:
    """The data of a ChoiceMetric section (path, split, shots, num_samples). UserError where there is none of it.

    path holds the folder `split` (and dev/, for the examples), or the .csv files themselves, with dev/ beside it.
    """
    if not section.path:
        raise UserError("metric: ChoiceMetric has no path: name the folder of MMLU or CMMLU, with dev/ and test/")
    root = Path(section.path).expanduser()
    folder = root / section.split
    if not folder.is_dir():
        if not any(root.glob("*.csv")):
            there = ", ".join(sorted(entry.name for entry in root.iterdir())) if root.is_dir() else "no such folder"
            raise UserError(f"metric.path: {root} has neither a folder {section.split} nor a .csv file ({there})")
        folder, root = root, root.parent
    questions = {name: rows[: section.num_samples] for name, rows in read_choice_folder(folder).items()}
    examples = _read_examples(root / "dev", section.shots, questions) if section.shots else {}
    chinese = [any("\u4e00" <= letter <= "\u9fff" for letter in rows[0].question) for rows in questions.values()]
    return ChoiceData(questions, examples, 2 * sum(chinese) > len(chinese))


def _read_examples(
    folder: Path, shots: int, questions: dict[str, list[ChoiceQuestion]]
) -> dict[str, list[ChoiceQuestion]]:
    examples = read_choice_folder(folder) if folder.is_dir() else {}
    counts = {name: len(examples.get(name, ())) for name in questions}
    short = [f"{count or 'no'} for {name}" for name, count in counts.items() if count < shots]
    if short:
        raise UserError(
            f"metric.shots is {shots}, and the examples in {folder} are fewer: {', '.join(short[:3])}"
            f"{' ...' if len(short) > 3 else ''}; add what is missing, or set shots {min(counts.values())}"
        )
    return examples


@dataclass(frozen=True)
class ChoicePrompt:
    """A question as the model sees it. shots: how many examples stand before it.

    They are fewer than asked for if it is too long with more, or if there are no more besides the question itself.
    """

    question: ChoiceQuestion
    text: str
    shots: int


def choice_prompt(
    question: ChoiceQuestion, examples: Sequence[ChoiceQuestion], chinese: bool, shots: int
) -> ChoicePrompt:
    """The prompt with the first `shots` examples. A question that is itself among the examples is not shown there."""
    subject = question.subject.replace("_", " ")
    if chinese:
        subject = CHINESE_NAMES.get(question.subject, subject)
        head = f"以下是关于{subject}的单项选择题，请直接给出正确答案的选项。"
    else:
        head = f"The following are multiple choice questions (with answers) about {subject}."
    shown = [example for example in examples if example.question != question.question][:shots]
    parts = [head, *(f"{_asked(example, chinese)} {example.answer}" for example in shown), _asked(question, chinese)]
    return ChoicePrompt(question, "\n\n".join(parts), len(shown))


def _asked(question: ChoiceQuestion, chinese: bool) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question}{choices}\n{'答案：' if chinese else 'Answer:'}"


def found_letter(text: str) -> str:
    """The letter that an answer names first, "" if none: "B", "(B)", "The answer is B.", "答案是B"."""
    match = _LETTER.search(text)
    return match[0] if match else ""


def letter_is_certain(text: str) -> bool:
    """Whether an answer names a letter, and goes on far enough that it can no longer turn out to be none."""
    return _LETTER.search(text + "a") is not None  # behind an unfinished word a small letter is the worst that can come
