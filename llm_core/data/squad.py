"""SQuAD 1.1 -> training rows (prompt, answer, eos) or evaluation rows (prompt) with the gold answers beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.data.chunks import Chunk, Encoded
from llm_core.data.inputs import read_json, required_text
from llm_core.data.segments import Samples, cut_and_count, encode_samples, plain_sample, to_rows
from llm_core.errors import UserError
from llm_core.text import Tokenizer
from llm_core.text.templates import squad_prompt

_QUESTIONS_PER_CHUNK = 500
GOLDS_SUFFIX = "golds.jsonl"


@dataclass(frozen=True)
class Question:
    """A question on a passage. answers: the gold answers in the file's order, at least one."""

    id: str
    passage: str
    question: str
    answers: tuple[str, ...]


def read_squad(path: Path, all_questions: bool) -> tuple[list[Question], dict[str, int]]:
    """Questions of a SQuAD file, and counts.

    Only the first question of every paragraph by default, as MindFormers' tool does (2,067 of the 10,570 of
    dev-v1.1). Counts: questions_in_file, questions_without_answer (left out; SQuAD 2 has such).
    UserError with the place for anything that is not SQuAD's form.
    """
    questions, counts = [], {"questions_in_file": 0, "questions_without_answer": 0}
    for title, article in enumerate(_list(read_json(path), "data", str(path))):
        for number, paragraph in enumerate(_list(article, "paragraphs", f"{path}: article {title}")):
            place = f"{path}: article {title}, paragraph {number}"
            passage = required_text(paragraph, "context", place)
            asked = _list(paragraph, "qas", place)
            counts["questions_in_file"] += len(asked)
            for index, row in enumerate(asked if all_questions else asked[:1]):
                question = _question(row, passage, f"{place}, question {index}")
                if question.answers:
                    questions.append(question)
                else:
                    counts["questions_without_answer"] += 1
    if not questions:
        raise UserError(f"{path}: no question with an answer in it")
    return questions, counts


def _list(row: Any, key: str, place: str) -> list[Any]:
    if not isinstance(row, dict) or not isinstance(row.get(key), list):
        raise UserError(f"{place}: has no list {key!r}; SQuAD 1.1's form is data > paragraphs > qas > answers")
    return row[key]


def _question(row: Any, passage: str, place: str) -> Question:
    answers = tuple(
        required_text(answer, "text", f"{place}, answer {number}")
        for number, answer in enumerate(_list(row, "answers", place))
    )
    return Question(str(row.get("id", "")), passage, required_text(row, "question", place), answers)


@dataclass(frozen=True)
class EncodeSquadTrain:
    """Chunk -> the arrays of Samples: prompt + first answer + eos, at most max_length + 1; learnt: answer and eos.

    A longer sample is dropped and counted: its answer would be cut off, or its passage lack it.
    """

    max_length: int

    def __call__(self, tokenizer: Tokenizer, questions: list[Question]) -> Encoded:
        width = self.max_length + 1
        rows = [
            plain_sample(tokenizer, "".join(squad_prompt(q.passage, q.question)), q.answers[0]) for q in questions
        ]
        samples = encode_samples(tokenizer, rows)
        fitting, counts = cut_and_count(samples, width, drop_long=True)
        return Encoded(asdict(fitting), {"samples": len(questions), **counts})


@dataclass(frozen=True)
class EncodeSquadEval:
    """Chunk -> rows [rows, max_length]: input_ids = bos + prompt, labels = ids of the first answer; both padded.

    A prompt that is too long loses the end of its passage, never the question (samples counted in cut_samples); if
    the question alone is too long, the sample is dropped. `kept` int64 [rows]: which questions of the chunk remain.
    """

    max_length: int

    def __call__(self, tokenizer: Tokenizer, questions: list[Question]) -> Encoded:
        ids, counts_of_parts = tokenizer.encode_parts([squad_prompt(q.passage, q.question) for q in questions])
        answers = tokenizer.encode_arrays([q.answers[0] for q in questions])
        passage, rest = counts_of_parts.reshape(-1, 2).T  # tokens up to the passage's end, and after it
        room = self.max_length - len(tokenizer.start_ids)
        excess = np.maximum(passage + rest - room, 0)
        kept = (rest <= room) & (np.array([len(answer) for answer in answers]) <= self.max_length)
        prompts = np.split(ids, np.cumsum(passage + rest)[:-1])
        rows = [
            np.concatenate([tokenizer.start_ids, prompts[i][: passage[i] - excess[i]], prompts[i][passage[i] :]])
            for i in np.flatnonzero(kept)
        ]
        pad = tokenizer.pad_or_substitute_id
        arrays = {
            "input_ids": _padded(rows, self.max_length, pad),
            "labels": _padded([answers[i] for i in np.flatnonzero(kept)], self.max_length, pad),
            "kept": np.flatnonzero(kept),
        }
        counts = {
            "samples": len(questions),
            "tokens": sum(map(len, rows)),
            "cut_samples": int((excess[kept] > 0).sum()),
            "cut_tokens": int(excess[kept].sum()),
            "dropped_samples": int((~kept).sum()),
        }
        return Encoded(arrays, counts)


def _padded(rows: Sequence[np.ndarray], width: int, pad_id: int) -> np.ndarray:
    padded = np.full((len(rows), width), pad_id, np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


class Squad:
    """A SQuAD file -> records {"input_ids", "labels"}: max_length + 1 wide in mode "train", max_length in "eval".

    In mode "eval" the gold answers of record i are line i of OUTPUT.golds.jsonl, {"record": i, "id", "question",
    "answers": [...]}; the manifest lists that file under "side_files".
    """

    unit = "questions"

    def __init__(self, input_file: Path, max_length: int, mode: str, all_questions: bool = False) -> None:
        self.inputs = [input_file]
        self.kind = f"squad {mode}"
        self.arguments = {"max_length": max_length, "mode": mode, "all_questions": all_questions}
        width = max_length + (mode == "train")
        self.columns = {"input_ids": width, "labels": width}
        self.encoder = EncodeSquadTrain(max_length) if mode == "train" else EncodeSquadEval(max_length)
        self._questions, self._read_counts = read_squad(input_file, all_questions)
        self._golds: list[Question] = []

    def chunks(self) -> list[Chunk]:
        """See DataSet. Some hundred questions."""
        parts = [self._part(number) for number in range(-(-len(self._questions) // _QUESTIONS_PER_CHUNK))]
        return [Chunk(part, len(part)) for part in parts]

    def _part(self, number: int) -> list[Question]:
        return self._questions[number * _QUESTIONS_PER_CHUNK : (number + 1) * _QUESTIONS_PER_CHUNK]

    def rows(self, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See DataSet. Notes the gold answers of the rows."""
        if "kept" in arrays:
            self._golds += [self._part(number)[index] for index in arrays["kept"]]
            return {name: arrays[name] for name in self.columns}
        return to_rows(Samples(**arrays), self.columns["input_ids"], self.pad_id)

    def counts(self, encoded: dict[str, int], records: int) -> dict[str, int]:
        """See DataSet."""
        return {**encoded, **self._read_counts}

    def side_files(self) -> dict[str, bytes]:
        """See DataSet."""
        lines = (
            json.dumps(
                {"record": record, "id": q.id, "question": q.question, "answers": q.answers}, ensure_ascii=False
            )
            for record, q in enumerate(self._golds)
        )
        return {GOLDS_SUFFIX: "".join(line + "\n" for line in lines).encode()} if self._golds else {}
