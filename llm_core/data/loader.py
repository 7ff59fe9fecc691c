"""Batches of records in a reproducible order, read ahead by one thread.

The order of an epoch depends on (seed, epoch) alone, and a position in it is (epoch, batch index): a run that
resumes there sees the very batches that the uninterrupted one sees. With several ranks every global batch is
the same as with one; each rank takes its rows of it.

    loader = Loader(records, batch_size=4, seq_length=256, columns=["input_ids"], shuffle=True, seed=0,
                    vocab_size=32000)
    for batch in loader.epoch(epoch=3, start_batch=17): ...
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from llm_core.data.batch import IGNORED, Batch
from llm_core.data.records import RecordFile
from llm_core.errors import UserError

_READ_AHEAD = 4  # batches


class Loader:
    """The batches of one data set.

    batch_size: records a rank and batch; a global batch holds batch_size * world of them. columns: the
    records' columns to use: ["input_ids"] or ["input_ids", "labels"]. num_samples: use the first so many
    records. drop_remainder: leave the last, short batch of an epoch out; otherwise it is filled up with rows
    that take no part in the loss (input_ids 0, labels -100, record_ids -1), so that shapes are static.
    kind "train": records hold seq_length + 1 tokens; "eval": seq_length tokens (one fewer target) as well.

    records, num_records, batch_size (records a rank), steps_per_epoch: what came of it.

    UserError, when made: a missing column, another length, no batch at all; when read: an id outside
    0 .. vocab_size - 1 (labels: -100 as well; num_labels: those of a classifier are below it), damaged data. Each names
    the file and both numbers.
    """

    def __init__(
        self,
        records: RecordFile,
        *,
        batch_size: int,
        seq_length: int,
        columns: Sequence[str] = ("input_ids",),
        shuffle: bool = False,
        seed: int = 0,
        drop_remainder: bool = False,
        num_samples: int | None = None,
        rank: int = 0,
        world: int = 1,
        vocab_size: int,
        num_labels: int | None = None,
        kind: str = "train",
    ):
        self.records = records
        self._columns = _usable_columns(records, columns)
        _check_widths(records, self._columns, seq_length, kind)
        self.batch_size = batch_size
        self._rank = rank
        self._global_batch = batch_size * world
        self._shuffle = shuffle
        self._seed = seed
        self._limits = {"input_ids": vocab_size, "labels": num_labels or vocab_size}
        limited = num_samples is not None and num_samples > 0
        self.num_records = min(num_samples, records.num_records) if limited else records.num_records
        whole, rest = divmod(self.num_records, self._global_batch)
        self.steps_per_epoch = whole if drop_remainder or not rest else whole + 1
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{records.path}: {self.num_records} records do not fill one batch of {self._global_batch} "
                f"(batch_size {batch_size} x {world} ranks). Use a smaller batch_size or more data."
            )

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Batches start_batch .. steps_per_epoch - 1 of an epoch (both counted from 0).

        Closing the iterator, or an exception, also ends its reading thread.
        """
        order = self._order(epoch)
        return _read_ahead(self._batch(order, index) for index in range(start_batch, self.steps_per_epoch))

    def _order(self, epoch: int) -> np.ndarray:
        """Record numbers int64 [num_records] in the order of this epoch."""
        if not self._shuffle:
            return np.arange(self.num_records)
        # the bits of Philox are the same in every numpy version, its permutations need not be
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(self.num_records)
        return np.argsort(bits, kind="stable")

    def _batch(self, order: np.ndarray, index: int) -> Batch:
        """Batch `index` of an epoch with this order: this rank's share of the global batch."""
        first = index * self._global_batch + self._rank * self.batch_size
        batch = self.read(order[first : min(first + self.batch_size, (index + 1) * self._global_batch)])
        missing = self.batch_size - len(batch.record_ids)
        return _filled_up(batch, missing) if missing else batch

    def read(self, numbers: np.ndarray) -> Batch:
        """These records (int64 [n]), in this order, their ids checked as in every batch."""
        rows = self.records.read(numbers)
        self._check_ids(rows, numbers)
        return Batch(rows["input_ids"], rows["labels"] if "labels" in self._columns else None, numbers)

    def _check_ids(self, rows: dict[str, np.ndarray], numbers: np.ndarray) -> None:
        for name in self._columns:
            # as unsigned, a negative id is a large one: one comparison finds both kinds
            limit = self._limits[name]
            bad = rows[name].view(np.uint32) >= limit
            if name == "labels":
                bad &= rows[name] != IGNORED
            if bad.any():
                row, column = np.argwhere(bad)[0]
                place = f"{self.records.describe(int(numbers[row]))}: {name}[{column}] is {rows[name][row, column]}"
                if limit != self._limits["input_ids"]:
                    raise UserError(
                        f"{place}, and the model's classes are 0 .. {limit - 1}. Set model_config.num_labels, or give "
                        "a classifier's records (tools/dataset_preprocess/mrpc_process.py)"
                    )
                raise UserError(
                    f"{place}, outside the model's vocabulary 0 .. {limit - 1}. Were the records written with another "
                    "tokenizer? Write them again, or set model_config.vocab_size to the tokenizer's."
                )


def _filled_up(batch: Batch, missing: int) -> Batch:
    """The batch with `missing` more rows, which take no part in the loss."""
    below = ((0, missing), (0, 0))
    labels = None if batch.labels is None else np.pad(batch.labels, below, constant_values=IGNORED)
    record_ids = np.pad(batch.record_ids, (0, missing), constant_values=-1)
    return Batch(np.pad(batch.input_ids, below), labels, record_ids)


def _usable_columns(records: RecordFile, columns: Sequence[str]) -> list[str]:
    for name in columns:
        if name not in records.columns:
            raise UserError(
                f"{records.path}: has no column {name}; its columns are "
                f"{', '.join(sorted(records.columns))}. Set the data "
                "set's input_columns to what it has, or write it again (labels: --dataset_type qa)."
            )
    if "input_ids" not in columns:
        raise UserError(f"input_columns {list(columns)}: input_ids must be one of them.")
    return [name for name in ("input_ids", "labels") if name in columns]


def _check_widths(records: RecordFile, columns: Sequence[str], seq_length: int, kind: str) -> None:
    widths = {records.columns[name] for name in columns}
    allowed = {seq_length + 1} if kind == "train" else {seq_length, seq_length + 1}
    if len(widths) > 1 or not widths <= allowed:
        held = ", ".join(f"{records.columns[name]} {name}" for name in columns)
        wanted = "seq_length + 1" if kind == "train" else "seq_length or seq_length + 1"
        hint = (
            f"seq_length {min(widths) - 1}, or preprocess the data with --seq_length {seq_length}"
            if len(widths) == 1
            else f"columns of one length: preprocess the data again with --seq_length {seq_length}"
        )
        raise UserError(
            f"{records.path}: a record holds {held}; with seq_length {seq_length} a {kind} record must hold "
            f"{' or '.join(str(width) for width in sorted(allowed))} ({wanted}). Use {hint}."
        )


def _read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Pass batches through, made in a thread up to `_READ_AHEAD` ahead; its exceptions come out here."""
    made: queue.Queue[Batch | BaseException | None] = queue.Queue(_READ_AHEAD)
    stop = threading.Event()

    def offer(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                offer(batch)
                if stop.is_set():
                    return
            offer(None)
        except BaseException as error:  # also KeyboardInterrupt: nothing may leave the consumer waiting
            offer(error)

    thread = threading.Thread(target=work, name="records-ahead", daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
