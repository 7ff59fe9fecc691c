"""Encoding in chunks: by several processes, in order, and kept on disk so that a killed run goes on where it was.

A data set is a list of chunks whose borders depend on the input alone. Each is encoded by itself into a file of the
work folder; the parent reads them back in order. So the result cannot depend on the number of workers, no array
crosses a pipe, and whatever is on disk need not be done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llm_core.errors import EnvironmentFault, UserError
from llm_core.text import Tokenizer, load_tokenizer

_FORMAT = 1  # raise it when what a chunk file holds changes


@dataclass(frozen=True)
class Chunk:
    """payload: what the encoder needs (picklable). weight: its share of the progress (bytes or rows)."""

    payload: Any
    weight: int


@dataclass(frozen=True)
class Encoded:
    """What became of one chunk: arrays by name, and counts that add up over chunks."""

    arrays: dict[str, np.ndarray]
    counts: dict[str, int]


Encoder = Callable[[Tokenizer, Any], Encoded]  # picklable: a module's function, or a frozen dataclass that is called


class WorkFolder:
    """The folder of finished chunks, `.NAME.partial` beside the output; emptied if it belongs to another job.

    `job` says all that the chunks depend on (hashes of the inputs, the encoder, the tokenizer). A context manager:
    the folder stays after a kill or a fault of the machine; `remove` and a UserError remove it. UserError if another
    process works in it.
    """

    def __init__(self, output: Path, job: dict[str, Any]) -> None:
        self.path = output.with_name(f".{output.name}.partial")
        content = json.dumps({"format": _FORMAT, **job}, sort_keys=True)
        self._key = hashlib.sha256(content.encode()).hexdigest()

    def __enter__(self) -> WorkFolder:
        with _environment_faults(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise UserError(
                    f"{self.path}: another process is writing this output; wait for it, or choose another --output_file"
                ) from None
            key_file = self.path / "job"
            if not key_file.is_file() or key_file.read_text() != self._key:
                for file in self.path.iterdir():
                    file.unlink()
                key_file.write_text(self._key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        if kind is not None and issubclass(kind, UserError):
            self.remove()  # what mends the mistake changes the job

    def file(self, number: int) -> Path:
        """Where chunk `number` is kept."""
        return self.path / f"chunk_{number:06d}.npz"

    def remove(self) -> None:
        """The output is whole: the chunks are no longer needed."""
        shutil.rmtree(self.path, ignore_errors=True)


class ChunkEncoder:
    """Encodes chunks with `num_workers` processes (1: in this process), each of which loads the tokenizer once."""

    def __init__(self, tokenizer_path: Path, encoder: Encoder, num_workers: int) -> None:
        self._encoder = encoder
        self._pool: ProcessPoolExecutor | None = None
        self._tokenizer: Tokenizer | None = None
        if num_workers == 1:
            self._tokenizer = load_tokenizer(tokenizer_path)
        else:
            # spawn: a fork would copy whatever threads and locks this process has (MindSpore's, a progress bar's)
            self._pool = ProcessPoolExecutor(
                num_workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_path, encoder)
            )

    def __enter__(self) -> ChunkEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)  # waits for the chunks in work: nobody writes after this

    def start(self, chunks: Sequence[Chunk], folder: WorkFolder) -> Iterator[int]:
        """Begin encoding the chunks that `folder` lacks; iterate over the weights as chunks are done, in order.

        With one process the work is done while iterating. Errors of a chunk are raised in the order of chunks.
        """
        todo = [i for i in range(len(chunks)) if not folder.file(i).exists()]
        if self._pool is None:
            return self._encode_here(chunks, folder, todo)
        tasks = {i: self._pool.submit(_encode_in_worker, chunks[i].payload, folder.file(i)) for i in todo}
        return self._await_tasks(chunks, tasks)

    def _encode_here(self, chunks: Sequence[Chunk], folder: WorkFolder, todo: list[int]) -> Iterator[int]:
        missing = set(todo)
        for number, chunk in enumerate(chunks):
            if number in missing:
                _save(folder.file(number), self._encoder(self._tokenizer, chunk.payload))
            yield chunk.weight

    def _await_tasks(self, chunks: Sequence[Chunk], tasks: dict[int, Any]) -> Iterator[int]:
        for number, chunk in enumerate(chunks):
            if number in tasks:
                try:
                    tasks[number].result()
                except BrokenProcessPool:
                    raise EnvironmentFault(
                        "a tokenizing process was killed (out of memory?); start the same command again with a smaller "
                        "--num_workers: it goes on from the finished chunks"
                    ) from None
            yield chunk.weight


def read_chunk(file: Path) -> Encoded:
    """What `ChunkEncoder` kept in `file`."""
    with np.load(file, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    counts = json.loads(arrays.pop("counts").tobytes())
    return Encoded(arrays, counts)


def _save(file: Path, encoded: Encoded) -> None:
    """Under a temporary name until it is whole, so that a file that exists is a chunk that is done."""
    counts = json.dumps({name: int(count) for name, count in encoded.counts.items()})
    content = io.BytesIO()  # in memory: a ZipFile whose disk is full prints a traceback when it is collected
    np.savez(content, counts=np.frombuffer(counts.encode(), np.uint8), **encoded.arrays)
    temporary = file.with_suffix(".tmp")
    with _environment_faults(file.parent):
        temporary.write_bytes(content.getbuffer())
        os.replace(temporary, file)


_worker: tuple[Tokenizer, Encoder] | None = None  # of this process, if it is a worker


def _start_worker(tokenizer_path: Path, encoder: Encoder) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker is one thread
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = (load_tokenizer(tokenizer_path), encoder)


def _die_with_parent() -> None:
    """A killed parent cannot end its pool, and idle workers would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode_in_worker(payload: Any, file: Path) -> None:
    tokenizer, encoder = _worker
    _save(file, encoder(tokenizer, payload))


@contextlib.contextmanager
def _environment_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(f"{folder}: cannot write there: {error.strerror or error}") from error
