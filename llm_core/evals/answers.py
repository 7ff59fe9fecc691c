"""Questions from records, and the model's answers to them: what EM and F1 are computed from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llm_core.data.records import RecordFile
from llm_core.disk import sha256
from llm_core.errors import UserError
from llm_core.evals.squad import first_line
from llm_core.infer.generate import Generator
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.stream import TextStream
from llm_core.report.console import console
from llm_core.text import Tokenizer

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm

T = TypeVar("T")
GOLDS_SUFFIX = ".golds.jsonl"


@dataclass(frozen=True)
class Question:
    """A record of tools/dataset_preprocess/squad_data_process.py --mode eval."""

    record: int
    id: str
    prompt_ids: list[int]  # without padding
    golds: list[str]  # all right answers, at least one; the first is upstream's only one


def read_questions(
    records: RecordFile, tokenizer: Tokenizer, pad_token_id: int, num_samples: int | None = None
) -> list[Question]:
    """The questions of an evaluation data set, in its order.

    Right answers come from the .golds.jsonl that the records' manifest lists; without a manifest (files made with
    MindFormers) the one in column labels is decoded. Raises UserError if there are no labels either, if the two files
    do not fit, or if the records were written with another tokenizer.
    """
    if "labels" not in records.columns:
        raise UserError(
            f"{records.path}: no column labels, so no answers to compare with; write it with "
            "tools/dataset_preprocess/squad_data_process.py --mode eval"
        )
    _check_tokenizer(records, tokenizer)
    rows = records.read(np.arange(min(records.num_records, num_samples or records.num_records)))
    pads = {pad_token_id, tokenizer.pad_or_substitute_id}
    golds = _read_golds(records)
    questions = []
    for record, (prompt, answer) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
        answers, name = golds[record] if golds else ([tokenizer.decode(_unpadded(answer, pads))], str(record))
        questions.append(Question(record, name, _unpadded(prompt, pads), answers))
    return questions


def _check_tokenizer(records: RecordFile, tokenizer: Tokenizer) -> None:
    for path, manifest in records.manifests.items():
        wrote = manifest.get("tokenizer") or {}
        if wrote.get("sha256", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise UserError(
                f"{path}: the records were written with another tokenizer ({wrote.get('file')}, "
                f"{wrote.get('vocab_size')} tokens) than {tokenizer.path} ({tokenizer.vocab_size}): write them again"
            )


def _read_golds(records: RecordFile) -> list[tuple[list[str], str]]:
    """(right answers, id) of every record; empty if no manifest lists a file of them."""
    listed = {
        manifest_path.parent / name: facts
        for manifest_path, manifest in records.manifests.items()
        for name, facts in manifest.get("side_files", {}).items()
        if name.endswith(GOLDS_SUFFIX)
    }
    if not listed:
        return []
    if len(records.files) > 1:
        raise UserError(f"{records.path}: {len(records.files)} files; EmF1Metric evaluates one: name it")
    path, facts = next(iter(listed.items()))
    if not path.exists() or sha256(path) != facts["sha256"]:
        raise UserError(f"{path}: missing, or not what was written with the records; copy it, or write both again")
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not at U+2028, which JSON may hold
    try:
        golds = [([str(text) for text in row["answers"]], str(row["id"])) for row in map(json.loads, lines)]
        whole = all(answers for answers, _ in golds)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole or len(golds) != records.num_records:
        raise UserError(
            f"{path}: not the right answers of the {records.num_records} records of {records.path}; write both again"
        )
    return golds


def _unpadded(ids: np.ndarray, pads: set[int]) -> list[int]:
    """The ids without the padding behind them, negative ones (labels of -100) included."""
    real = np.flatnonzero(~np.isin(ids, list(pads)) & (ids >= 0))
    return ids[: real[-1] + 1].tolist() if len(real) else []


def answer_questions(
    generator: Generator,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    params: SamplingParams,
    *,
    seed: int,
    batch_size: int,
    comm: Comm | None = None,
) -> list[str]:
    """The first line that the model writes to each question; only that line counts, so a row ends with it.

    Questions of like length share a batch; with do_sample each draws with seed + the number of its record, whatever
    stands beside it. comm: as for `write_texts`. Raises UserError, before anything is generated, for a prompt that
    leaves no room for an answer.
    """
    params = replace(params, num_return_sequences=1)
    for question in questions:
        try:
            params.new_tokens(len(question.prompt_ids), generator.spec.max_position)
        except UserError as error:
            raise UserError(f"eval_dataset, record {question.record}: {error}") from None
    prompts = [question.prompt_ids for question in questions]
    seeds = [seed + question.record for question in questions]
    texts = write_texts(generator, tokenizer, prompts, params, seeds, done=_has_line, batch_size=batch_size, comm=comm)
    return [first_line(text) for text in texts]


def _has_line(text: str) -> bool:
    return "\n" in text.lstrip()


def write_texts(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    *,
    done: Callable[[str], bool],
    batch_size: int,
    comm: Comm | None = None,
) -> list[str]:
    """What the model writes to each prompt, until `done` says of the text so far that it is enough.

    Prompts of like length share a batch. seeds: what each prompt draws with. comm: with other ranks, among
    whose replicas the batches are shared out; all have all texts.
    """
    texts: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    batches = own_batches(order, batch_size, comm)
    with console.progress(sum(map(len, batches)), desc="answer", unit="question") as bar:
        for batch in batches:
            streams = [TextStream(tokenizer, prompts[number], params.stop_strings) for number in batch]

            def take(row: int, token: int, streams: list[TextStream] = streams) -> bool:
                streams[row].push(token)
                return streams[row].stopped or done(streams[row].text)

            rows, drawn_with = [prompts[number] for number in batch], [seeds[number] for number in batch]
            generator.generate(rows, params, drawn_with, take, rows=batch_size)
            for number, stream in zip(batch, streams, strict=True):
                stream.finish()
                texts[number] = stream.text
            bar.update(len(batch))
    texts = join_replicas(texts, comm)
    return [texts[number] for number in range(len(prompts))]


def own_batches(items: Sequence[T], batch_size: int, comm: Comm | None) -> list[Sequence[T]]:
    """The batches that this rank's replica runs, every so many; without other ranks all of them."""
    batches = [items[first : first + batch_size] for first in range(0, len(items), batch_size)]
    return batches if comm is None else batches[comm.place.replica :: comm.layout.dp]


def join_replicas(found: dict[int, T], comm: Comm | None) -> dict[int, T]:
    """What all replicas have found, by number, on all ranks; anything that JSON holds."""
    if comm is None:
        return found
    return {number: value for part in comm.of_replicas(list(found.items())) for number, value in part}
