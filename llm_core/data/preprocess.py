"""Preprocessing: input files -> token records with a manifest. What tools/dataset_preprocess/*.py call.

    inputs -> chunks -> (workers) encoded chunks, kept in a work folder -> records + manifest -> work folder removed

The records and the manifest depend on inputs, tokenizer and arguments alone, not on the number of workers nor on
whether the run was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_core.data.chunks import Chunk, ChunkEncoder, Encoder, WorkFolder, read_chunk
from llm_core.data.inputs import sha256_of
from llm_core.errors import UserError
from llm_core.report.console import console
from llm_core.text import Tokenizer, load_tokenizer
from llm_core.text.lookup import find_tokenizer_file


class DataSet(Protocol):
    """One kind of input (wiki.WikiText, qa.Conversations, squad.Squad) and how it becomes rows.

    kind: its name in the manifest. inputs: its files. arguments: what else the records depend on. columns: name ->
    width of a record. unit: of the chunks' weights. encoder: what the workers do with a chunk. pad_id: given before the
    first `rows`.
    """

    kind: str
    inputs: Sequence[Path]
    arguments: dict[str, Any]
    columns: dict[str, int]
    unit: str
    encoder: Encoder
    pad_id: int

    def chunks(self) -> list[Chunk]:
        """The input in parts whose borders depend on the input alone."""

    def rows(self, number: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Records (column -> int32 [n, width]) from the encoded chunk `number`; called in order."""

    def counts(self, encoded: dict[str, int], records: int) -> dict[str, int]:
        """Counts for the manifest, from the chunks' counts summed and the number of records written."""

    def side_files(self) -> dict[str, bytes]:
        """Files beside the output, by what their names add to its name; asked for after the last `rows`."""


@dataclass(frozen=True)
class Result:
    """What a run wrote: counts as in the manifest, and how long it took from reading to the last file in place."""

    output: Path
    records: int
    counts: dict[str, int]
    seconds: float


def preprocess(
    data_set: DataSet,
    output: Path,
    tokenizer: str | Path,
    *,
    repeat: int = 1,
    num_shards: int = 1,
    num_workers: int | None = None,
) -> Result:
    """Write the records of `data_set` to the MindRecord `output`, with a manifest and the side files beside it.

    tokenizer: as for load_tokenizer. repeat: how often the whole data is written. num_workers: processes, default
    one a core. A killed run leaves its finished chunks in `.NAME.partial` beside the output, and the same command
    goes on from there.
    UserError for bad input or arguments, EnvironmentFault where the disk refuses; the output is then as it was.
    """
    started = time.perf_counter()
    require_positive(repeat=repeat, file_partition=num_shards)
    if num_workers is not None:
        require_positive(num_workers=num_workers)
    if not output.name or output.is_dir():
        raise UserError(f"{output}: is a folder; give a file name, such as {output / 'train.mindrecord'}")
    tokenizer_path = find_tokenizer_file(tokenizer)
    loaded = load_tokenizer(tokenizer_path)  # a damaged one is reported before any work
    inputs = [{"name": path.name, "sha256": sha256_of(path)} for path in data_set.inputs]
    data_set.pad_id = loaded.pad_or_substitute_id
    chunks = data_set.chunks()
    job = {"inputs": inputs, "tokenizer": loaded.fingerprint, "encoder": repr(data_set.encoder),
           "chunks": [chunk.weight for chunk in chunks], "arguments": data_set.arguments}
    manifest = _manifest(data_set, inputs, loaded, repeat)
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(chunks))
    with WorkFolder(output, job) as folder:
        with ChunkEncoder(tokenizer_path, data_set.encoder, workers) as encoder:
            done = encoder.start(chunks, folder)
            rows = _rows(data_set, chunks, done, folder, repeat)
            records, counts = _write(rows, data_set, output, manifest, num_shards, folder)
        folder.remove()
    return Result(output, records, counts, time.perf_counter() - started)


def report(result: Result) -> None:
    """Say what was written: counts as notes, MindFormers' two lines as the result."""
    console.info(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in result.counts.items()))
    rate = result.counts["tokens"] / max(result.seconds, 1e-9)
    console.info(f"{result.seconds:.1f} s from reading to the last file in place, {rate:,.0f} tokens/s")
    console.result(f"Transformed {result.records} records.")
    console.result(f"Transform finished, output files refer: {result.output}")


def require_positive(**values: int) -> None:
    """UserError naming the flag for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


def _rows(
    data_set: DataSet, chunks: list[Chunk], done: Iterator[int], folder: WorkFolder, repeat: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, int]]]:
    """(rows, counts) of one chunk after the other as they are done, then `repeat` - 1 times more from the folder."""
    with console.progress(sum(chunk.weight for chunk in chunks), desc="preprocess", unit=data_set.unit) as bar:
        for number, weight in enumerate(done):
            chunk = read_chunk(folder.file(number))
            yield data_set.rows(number, chunk.arrays), chunk.counts
            bar.update(weight)
    for _ in range(repeat - 1):
        for number in range(len(chunks)):
            chunk = read_chunk(folder.file(number))
            yield data_set.rows(number, chunk.arrays), chunk.counts


def _write(
    rows: Iterator[tuple[dict[str, np.ndarray], dict[str, int]]],
    data_set: DataSet,
    output: Path,
    manifest: dict[str, Any],
    num_shards: int,
    folder: WorkFolder,
) -> tuple[int, dict[str, int]]:
    """Returns the number of records and the counts that went into the manifest."""
    from llm_core.data.records import RecordWriter

    with _ctrl_c_waits():  # Python aborts with pages of traceback if it ends while MindSpore is half imported
        import mindspore.mindrecord  # noqa: F401  takes seconds; the workers, if there are any, work meanwhile

    encoded_counts: Counter[str] = Counter()
    records = 0
    with RecordWriter(output, data_set.columns, manifest, num_shards) as writer:
        for columns, counts_of_chunk in rows:
            encoded_counts.update(counts_of_chunk)
            records += len(columns["input_ids"])
            writer.write_rows(columns)
        counts = data_set.counts(dict(encoded_counts), records)
        side_files = {f"{output.name}.{suffix}": content for suffix, content in data_set.side_files().items()}
        writer.manifest["counts"] = counts
        writer.manifest["side_files"] = {
            name: _kept(folder.path / name, content) for name, content in side_files.items()
        }
    for name in side_files:  # after the records: what stops those leaves the former files as they were
        os.replace(folder.path / name, output.with_name(name))
    return records, counts


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """A Ctrl-C in the block raises KeyboardInterrupt after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = []
    former = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if heard:
        raise KeyboardInterrupt


def _kept(file: Path, content: bytes) -> dict[str, Any]:
    """Write `content` and return what the manifest says of it."""
    file.write_bytes(content)
    return {"bytes": len(content), "sha256": sha256(content).hexdigest()}


def _manifest(
    data_set: DataSet, inputs: list[dict[str, str]], tokenizer: Tokenizer, repeat: int
) -> dict[str, Any]:
    return {
        "kind": data_set.kind,
        "arguments": {**data_set.arguments, "repeat": repeat},
        "inputs": inputs,
        "tokenizer": {
            "file": tokenizer.path.name,
            "path": str(tokenizer.path.absolute()),  # where show-data finds it
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_or_substitute_id,
        },
    }
