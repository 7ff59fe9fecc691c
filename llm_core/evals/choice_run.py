"""MMLU or CMMLU from a folder of CSV files to figures: by subject, by category, the means, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_core.data.choices import LETTERS
from llm_core.evals.choice import ChoiceScorer, ChoiceWriter, LetterIds, letter_ids
from llm_core.evals.choice_prompts import ChoiceData, ChoicePrompt, choice_prompt, found_letter
from llm_core.evals.subjects import categories_of
from llm_core.infer.results import write_whole
from llm_core.report.bars import draw_shares
from llm_core.report.console import console
from llm_core.report.table import table_lines
from llm_core.text import Tokenizer

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm

PREDICTIONS_NAME, PICTURE_NAME = "choice_predictions.jsonl", "choice.png"


@dataclass(frozen=True)
class Answered:
    """A question, the letter that the model chose ("" where it named none), and what it was chosen by.

    scores: of the four letters; text: what the model wrote; one of them is None, both where the prompt was too long.
    """

    prompt: ChoicePrompt
    letter: str
    scores: list[float] | None = None
    text: str | None = None

    @property
    def right(self) -> bool:
        """Whether it is the right letter."""
        return self.letter == self.prompt.question.answer


def measure_choices(
    config: Any, section: Any, data: ChoiceData, net: Any, tokenizer: Tokenizer, comm: Comm | None = None
) -> dict[str, Any]:
    """Ask, print table and means, draw the picture, write the predictions; returns the figures for the result file.

    comm: with other ranks, whose replicas share the questions; rank 0 alone prints, draws and writes.
    """
    writer = ChoiceWriter(config, net, tokenizer, comm) if section.method == "generation" else None
    longest = net.spec.max_position - (writer.room if writer else 0)
    asked, too_long = _prompts(data, section.shots, tokenizer, longest)
    prompts = list(asked)
    if writer:
        texts = writer.answers([prompt.text for prompt in prompts])
        answered = [Answered(p, found_letter(text), text=text) for p, text in zip(prompts, texts, strict=True)]
    else:
        scores = ChoiceScorer(net, config.runner_config.batch_size, comm).scores(list(asked.values()))
        answered = [
            Answered(prompt, LETTERS[int(np.argmax(row))], scores=row.tolist())
            for prompt, row in zip(prompts, scores, strict=True)
        ]
    answered += [Answered(prompt, "") for prompt in too_long]
    result = {
        "path": section.path,
        "split": section.split,
        "method": section.method,
        "shots": section.shots,
        **summarize(answered, data.chinese),
        "with_fewer_shots": sum(prompt.shots < section.shots for prompt in prompts),
        "too_long": len(too_long),
    }
    if comm is None or comm.rank == 0:
        _report(result, Path(config.output_dir))
        _write_predictions(Path(config.output_dir) / PREDICTIONS_NAME, answered)
    return result


def _prompts(
    data: ChoiceData, shots: int, tokenizer: Tokenizer, longest: int
) -> tuple[dict[ChoicePrompt, LetterIds], list[ChoicePrompt]]:
    """The prompts with their ids, each with as many examples as it has room for; and those too long without any."""
    asked, too_long = {}, []
    for subject, questions in data.questions.items():
        for number, question in enumerate(questions):
            for count in range(shots, -1, -1):
                prompt = choice_prompt(question, data.examples.get(subject, ()), data.chinese, count)
                ids = letter_ids(tokenizer, prompt.text)
                if ids.length <= longest:
                    asked[prompt] = ids
                    break
            else:
                too_long.append(prompt)
            if number == 0:
                _show(prompt, ids)
    return asked, too_long


def _show(prompt: ChoicePrompt, ids: LetterIds) -> None:
    """With -v: the first prompt of a subject, and how the letters follow it."""
    ends = ", ".join(f"{letter} {list(end)}" for letter, end in zip(LETTERS, ids.ends, strict=True))
    console.detail(f"{prompt.question.subject}, {prompt.shots} shots, {prompt.question.place}:\n{prompt.text}")
    console.detail(f"ids {ids.shared.tolist()}, then {ends}; right is {prompt.question.answer}")


def summarize(answered: Sequence[Answered], chinese: bool) -> dict[str, Any]:
    """Shares of right answers: micro (of all questions), macro (mean of the subjects), by category and by subject.

    A question that got no letter counts as wrong; `answered` says how many got one. A category's share is of its
    questions. CMMLU's China specific subjects are a category beside their other one.
    """
    subjects: dict[str, list[Answered]] = {}
    categories: dict[str, list[Answered]] = {}
    for each in answered:
        subjects.setdefault(each.prompt.question.subject, []).append(each)
    for subject, rows in sorted(subjects.items()):
        for category in categories_of(subject, chinese):
            categories.setdefault(category, []).extend(rows)
    by_subject = {
        subject: {**_shares(rows), "category": categories_of(subject, chinese)[0]}
        for subject, rows in sorted(subjects.items())
    }
    return {
        "questions": len(answered),
        "answered": sum(bool(each.letter) for each in answered) / len(answered),
        "micro": sum(each.right for each in answered) / len(answered),
        "macro": sum(entry["accuracy"] for entry in by_subject.values()) / len(by_subject),
        "categories": {category: _shares(rows) for category, rows in sorted(categories.items())},
        "subjects": by_subject,
    }


def _shares(rows: Sequence[Answered]) -> dict[str, Any]:
    return {
        "accuracy": sum(each.right for each in rows) / len(rows),
        "answered": sum(bool(each.letter) for each in rows) / len(rows),
        "questions": len(rows),
    }


def _report(result: dict[str, Any], output_dir: Path) -> None:
    """The table by subject and category, one line of means, and the picture."""
    header = ["subject", "category", "right", "answered", "questions"]
    rows = [[name, entry["category"], *_cells(entry)] for name, entry in result["subjects"].items()]
    rows += [[f"all of {name}", "", *_cells(entry)] for name, entry in result["categories"].items()]
    for line in table_lines(header, rows, left=2):
        console.result(line)
    console.result(
        f"{_conditions(result)}: micro {result['micro']:.2%}, macro {result['macro']:.2%}, "
        f"{result['answered']:.1%} of {result['questions']} questions answered"
    )
    if result["with_fewer_shots"] or result["too_long"]:
        console.warn(
            f"{result['with_fewer_shots']} prompts have fewer shots than {result['shots']}, and {result['too_long']} "
            "were too long for the model and count as wrong"
        )
    used = {entry["category"] for entry in result["subjects"].values()}
    groups: dict[str, dict[str, float]] = {category: {} for category in sorted(used)}
    for name, entry in result["subjects"].items():
        groups[entry["category"]][name] = entry["accuracy"]
    groups["categories"] = {name: entry["accuracy"] for name, entry in result["categories"].items()}
    title = f"{Path(result['path']).name}, {result['split']}: {_conditions(result)}"
    picture = draw_shares(groups, output_dir / PICTURE_NAME, title=title, mean=result["micro"], chance=1 / len(LETTERS))
    console.info(f"drawn in {picture}")


def _conditions(result: dict[str, Any]) -> str:
    return f"{result['method']}, {result['shots']} shot{'' if result['shots'] == 1 else 's'}"


def _cells(entry: dict[str, Any]) -> list[str]:
    return [f"{entry['accuracy']:.1%}", f"{entry['answered']:.1%}", str(entry["questions"])]


def _write_predictions(path: Path, answered: Sequence[Answered]) -> None:
    """One line a question, so that one can see what the shares are made of."""
    lines = []
    for each in answered:
        question = each.prompt.question
        line = {"subject": question.subject, "place": question.place, "answer": question.answer}
        line |= {"prediction": each.letter, "shots": each.prompt.shots}
        line |= {} if each.scores is None else {"scores": dict(zip(LETTERS, each.scores, strict=True))}
        line |= {} if each.text is None else {"text": each.text}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))
