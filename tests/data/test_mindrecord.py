"""Our reader of the MindRecord layout against MindSpore's own, on what the format can hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_core.data.mindrecord import Damaged, Shard, decode_integers
from llm_core.data.records import RecordFile


def write_small_pages(path: Path, schema: dict, rows: list[dict], shards: int = 1) -> None:
    """A file with pages of 64 KiB: many pages from few rows."""
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(path), shards, overwrite=True)
    writer.set_header_size(1 << 18)
    writer.set_page_size(1 << 16)
    writer.add_schema(schema, "test")
    for first in range(0, len(rows), 100):
        writer.write_raw_data(rows[first : first + 100])
    writer.commit()


def read_by_mindspore(files: list[Path], names: list[str]) -> dict[str, np.ndarray]:
    from mindspore.mindrecord import FileReader

    reader = FileReader([str(file) for file in files], num_consumer=1)
    rows = list(reader.get_next())
    reader.close()
    return {name: np.stack([row[name] for row in rows]) for name in names}


def test_equals_mindspore_reader_with_mixed_columns_pages_and_widths(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    ids = generator.integers(-(2**31), 2**31, (300, 129))
    ids[:, 1] = 5
    ids[:, 2] = 300
    ids[0, :6] = [0, -1, 127, -128, 2**31 - 1, -(2**31)]
    wide = ids.astype(np.int64) * 2**20
    rows = [
        {
            "text": "x" * (i % 7),
            "input_ids": ids[i].astype(np.int32),
            "weights": ids[i].astype(np.float32),
            "wide": wide[i],
            "number": i,
        }
        for i in range(300)
    ]
    schema = {
        "text": {"type": "string"},
        "input_ids": {"type": "int32", "shape": [-1]},
        "weights": {"type": "float32", "shape": [-1]},
        "wide": {"type": "int64", "shape": [-1]},
        "number": {"type": "int32"},
    }
    path = tmp_path / "mixed.mindrecord"
    write_small_pages(path, schema, rows)
    shard = Shard(path)
    assert sorted(shard.columns) == ["input_ids", "wide"]
    ours = [shard.row(i) for i in range(shard.num_records)]
    theirs = read_by_mindspore([path], ["input_ids", "wide"])
    for name, column in theirs.items():
        np.testing.assert_array_equal(np.stack([row[name] for row in ours]), column)
    np.testing.assert_array_equal(theirs["wide"], wide)


def test_a_file_written_as_mindformers_writes_it_is_read(tmp_path: Path) -> None:
    """No manifest, one column, rows in batches, shards named with a number."""
    ids = np.arange(250 * 65, dtype=np.int32).reshape(250, 65)
    path = tmp_path / "wiki.mindrecord"
    write_small_pages(
        path, {"input_ids": {"type": "int32", "shape": [-1]}}, [{"input_ids": row} for row in ids], shards=2
    )
    by_folder, by_common_name = RecordFile(tmp_path), RecordFile(path)
    by_one_shard = RecordFile(tmp_path / "wiki.mindrecord1")
    assert by_folder.files == by_common_name.files == by_one_shard.files
    assert by_folder.columns == {"input_ids": 65}
    assert by_folder.verify() == 0
    found = by_folder.read(np.arange(by_folder.num_records))["input_ids"]
    np.testing.assert_array_equal(found[np.argsort(found[:, 0])], ids)
    (tmp_path / "wiki.mindrecord0").unlink()
    with pytest.raises(Exception, match="wiki.mindrecord0: missing"):
        RecordFile(tmp_path / "wiki.mindrecord1")


@pytest.mark.parametrize("cut", [slice(0, 3), slice(0, 5), slice(0, -1), slice(1, None)])
def test_a_cut_column_is_damage(cut: slice) -> None:
    column = np.frombuffer(bytes([0, 0, 0, 3, 0b00_01_10_00, 7, 1, 1, 1, 0, 0, 0]), np.uint8)
    assert decode_integers(column).tolist() == [7, 257, 1]
    with pytest.raises(Damaged):
        decode_integers(column[cut])
