"""Real MindRecords, written once for all data tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llm_core.data.records import RecordFile, RecordWriter

VOCAB = 1000
SEQ_LENGTH = 16
COUNT = 530  # more than one internal write call


@pytest.fixture(scope="session")
def rows() -> dict[str, np.ndarray]:
    """input_ids and labels int32 [530, 17]; every second label is ignored, ids 0 and VOCAB - 1 occur."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, VOCAB, (COUNT, SEQ_LENGTH + 1), dtype=np.int32)
    ids[0, :2] = 0, VOCAB - 1
    labels = ids.copy()
    labels[:, ::2] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture(scope="session")
def record_path(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, np.ndarray]) -> Iterator[Path]:
    """The rows as one MindRecord; read only."""
    path = tmp_path_factory.mktemp("records") / "train.mindrecord"
    with RecordWriter(path, {name: SEQ_LENGTH + 1 for name in rows}, {"source": "made"}) as writer:
        writer.write_rows(rows)
    yield path
    shutil.rmtree(path.parent)


@pytest.fixture(scope="session")
def records(record_path: Path) -> RecordFile:
    return RecordFile(record_path)


@pytest.fixture
def copied(record_path: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the data set that a test may damage."""
    for file in record_path.parent.iterdir():
        shutil.copy(file, tmp_path)
    yield tmp_path / record_path.name
    for file in tmp_path.glob("*mindrecord*"):
        file.unlink()
