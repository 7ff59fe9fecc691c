"""Order, cursor, sharding and refusals of the loader."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from llm_core.data.batch import Batch, shift
from llm_core.data.loader import Loader
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.errors import UserError


def loader(records: RecordFile, **changes: object) -> Loader:
    settings: dict = {"batch_size": 8, "seq_length": 16, "shuffle": True, "seed": 3, "vocab_size": 1000}
    settings["columns"] = ["input_ids", "labels"]
    return Loader(records, **{**settings, **changes})


def ids(batches: object) -> list[list[int]]:
    return [batch.record_ids.tolist() for batch in batches]


def test_order_depends_on_seed_and_epoch_alone(records: RecordFile) -> None:
    once = ids(loader(records).epoch(2))
    assert ids(loader(records).epoch(2)) == once
    assert ids(loader(records).epoch(1)) != once
    assert ids(loader(records, seed=4).epoch(2)) != once
    assert ids(loader(records, batch_size=16).epoch(2))[0] == once[0] + once[1]
    assert sorted(sum(once, []))[6:] == list(range(530))


def test_order_is_the_recorded_one(records: RecordFile) -> None:
    """A resumed run of another version must see the same order."""
    assert ids(loader(records).epoch(0))[0] == [448, 212, 469, 369, 230, 174, 68, 231]


def test_batches_hold_their_records(records: RecordFile, rows: dict[str, np.ndarray]) -> None:
    for batch in loader(records, drop_remainder=True).epoch(0):
        np.testing.assert_array_equal(batch.input_ids, rows["input_ids"][batch.record_ids])
        np.testing.assert_array_equal(batch.labels, rows["labels"][batch.record_ids])
        assert batch.input_ids.dtype == batch.labels.dtype == np.int32


def test_every_cursor_continues_exactly(records: RecordFile) -> None:
    one = loader(records, num_samples=60)
    whole = ids(one.epoch(5))
    assert len(whole) == one.steps_per_epoch == 8
    for start in range(9):
        assert ids(one.epoch(5, start_batch=start)) == whole[start:]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("drop", [False, True])
def test_ranks_together_are_the_global_batch(records: RecordFile, world: int, drop: bool) -> None:
    alone = ids(loader(records, num_samples=61, drop_remainder=drop).epoch(1))
    shares = [
        ids(
            loader(records, num_samples=61, drop_remainder=drop, batch_size=8 // world, rank=rank, world=world).epoch(1)
        )
        for rank in range(world)
    ]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == alone


def test_the_last_batch_keeps_its_shape_and_its_filling_is_not_learnt(records: RecordFile) -> None:
    last = list(loader(records, columns=["input_ids"], num_samples=9).epoch(0))[-1]
    assert last.input_ids.shape == (8, 17) and last.labels is None
    assert (last.record_ids[1:] == -1).all() and last.record_ids[0] >= 0
    _, labels = shift(last, pad_token_id=-1)
    assert (labels[1:] == -100).all() and (labels[0] >= 0).all()


def test_drop_remainder_and_limits(records: RecordFile) -> None:
    assert loader(records, drop_remainder=True).steps_per_epoch == 66
    assert loader(records).steps_per_epoch == 67
    assert loader(records, num_samples=-1).num_records == 530
    with pytest.raises(UserError, match="530 records do not fill one batch of 1024"):
        loader(records, batch_size=512, world=2, drop_remainder=True)


def test_shift_masks_by_input_padding_and_labels() -> None:
    ids = np.array([[1, 5, 6, 0, 0]], np.int32)
    labels = np.array([[-100, -100, 6, 7, -100]], np.int32)
    tokens, targets = shift(Batch(ids, None, np.array([0])), pad_token_id=0)
    assert tokens.tolist() == [[1, 5, 6, 0]] and targets.tolist() == [[5, 6, 0, -100]]
    assert shift(Batch(ids, None, np.array([0])), pad_token_id=-1)[1].tolist() == [[5, 6, 0, 0]]
    assert shift(Batch(ids, labels, np.array([0])), pad_token_id=0)[1].tolist() == [[-100, 6, 7, -100]]
    assert shift(Batch(ids, labels, np.array([0])), 0, ignore_token_id=7)[1].tolist() == [[-100, 6, -100, -100]]
    assert tokens.dtype == targets.dtype == np.int32 and tokens.flags.c_contiguous


def test_another_length_is_refused_with_both_numbers(records: RecordFile) -> None:
    with pytest.raises(UserError, match=r"train\.mindrecord.*holds 17 input_ids.*seq_length 32.*33.*seq_length 16"):
        loader(records, seq_length=32)
    with pytest.raises(UserError, match="seq_length 17 a train record must hold 18"):
        loader(records, seq_length=17)
    assert loader(records, seq_length=17, kind="eval").steps_per_epoch == 67
    assert loader(records, seq_length=16, kind="eval").steps_per_epoch == 67
    with pytest.raises(UserError, match="must hold 18 or 19"):
        loader(records, seq_length=18, kind="eval")


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    with RecordWriter(path, {"input_ids": 17}) as writer:
        writer.write_rows({"input_ids": np.zeros((9, 17), np.int32)})
    with pytest.raises(UserError, match="has no column labels; its columns are input_ids"):
        loader(RecordFile(path))


def test_an_id_beyond_the_vocabulary_names_file_record_and_id(records: RecordFile) -> None:
    with pytest.raises(UserError, match=r"train\.mindrecord: record 0: input_ids\[1\] is 999, outside .* 0 \.\. 998"):
        list(loader(records, vocab_size=999, shuffle=False).epoch(0))


@pytest.mark.parametrize(("column", "value"), [("input_ids", -1), ("labels", -1), ("labels", 1000)])
def test_other_impossible_ids(tmp_path: Path, column: str, value: int) -> None:
    data = {name: np.zeros((9, 17), np.int32) for name in ("input_ids", "labels")}
    data["labels"][:] = -100
    data[column][8, 4] = value
    with RecordWriter(tmp_path / "a.mindrecord", {"input_ids": 17, "labels": 17}) as writer:
        writer.write_rows(data)
    batches = loader(RecordFile(tmp_path), shuffle=False, columns=["input_ids", "labels"]).epoch(0)
    next(batches)
    with pytest.raises(UserError, match=rf"record 8: {column}\[4\] is {value},"):
        next(batches)


def reading_threads() -> int:
    return sum(thread.name == "records-ahead" for thread in threading.enumerate())


def test_no_thread_is_left(records: RecordFile) -> None:
    batches = loader(records).epoch(0)
    assert reading_threads() == 0
    next(batches)
    assert reading_threads() == 1
    batches.close()
    assert reading_threads() == 0

    with pytest.raises(KeyError):
        for _ in loader(records).epoch(0):
            raise KeyError
    batches = loader(records, vocab_size=2).epoch(0)
    with pytest.raises(UserError):
        next(batches)
    assert len(list(loader(records).epoch(0))) == 67
    assert reading_threads() == 0
