"""What may stand under a record file's name, and what a reader says of anything else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_core.data import record_writer
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.errors import EnvironmentFault, UserError

ROOT = Path(__file__).parents[2]


def test_reads_any_record_in_any_order(records: RecordFile, rows: dict[str, np.ndarray]) -> None:
    order = np.array([529, 0, 7, 7, 500, 499])
    found = records.read(order)
    assert records.columns == {"input_ids": 17, "labels": 17}
    for name in rows:
        assert found[name].dtype == np.int32
        np.testing.assert_array_equal(found[name], rows[name][order])
    assert records.read(np.array([], np.int64))["input_ids"].shape == (0, 17)


def test_manifest_counts_and_hashes(record_path: Path, records: RecordFile) -> None:
    manifest = json.loads(Path(f"{record_path}.manifest.json").read_text())
    assert manifest["records"] == 530 and manifest["source"] == "made"
    assert sorted(manifest["files"]) == ["train.mindrecord", "train.mindrecord.db"]
    assert records.verify() == 2
    assert sorted(os.listdir(record_path.parent)) == sorted([*manifest["files"], "train.mindrecord.manifest.json"])


def test_mindspore_reads_what_we_write(record_path: Path, rows: dict[str, np.ndarray]) -> None:
    import mindspore.dataset as ds

    data = ds.MindDataset(str(record_path), columns_list=["input_ids", "labels"], shuffle=False)
    for index, (ids, labels) in enumerate(data.create_tuple_iterator(num_epochs=1, output_numpy=True)):
        np.testing.assert_array_equal(ids, rows["input_ids"][index])
        np.testing.assert_array_equal(labels, rows["labels"][index])
    assert index == 529


def test_output_is_the_same_whatever_the_size_of_the_calls(tmp_path: Path, rows: dict[str, np.ndarray]) -> None:
    hashes = []
    for size in (1, 97):
        path = tmp_path / str(size) / "same.mindrecord"
        with RecordWriter(path, {"input_ids": 17}) as writer:
            for first in range(0, 530, size):
                writer.write_rows({"input_ids": rows["input_ids"][first : first + size]})
        hashes.append(json.loads(Path(f"{path}.manifest.json").read_text())["files"])
    assert hashes[0] == hashes[1]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RecordWriter(tmp_path / "a.mindrecord", {"input_ids": 3}) as writer:
        writer.write_rows({"input_ids": np.zeros((600, 3), np.int32)})
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_no_record_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a.mindrecord: not one record.*seq_length"):
        RecordWriter(tmp_path / "a.mindrecord", {"input_ids": 3}).close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "array", [np.zeros((2, 4), np.int32), np.zeros((2, 3)), np.full((2, 3), 2**31), np.zeros(3, np.int32)]
)
def test_rows_of_another_shape_or_type_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    writer = RecordWriter(tmp_path / "a.mindrecord", {"input_ids": 3})
    with pytest.raises(ValueError, match="input_ids"):
        writer.write_rows({"input_ids": array})
    writer.abort()


def test_impossible_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot hold \*"):
        RecordWriter(tmp_path / "a*.mindrecord", {"input_ids": 3})
    with pytest.raises(UserError, match="is a folder"):
        RecordWriter(tmp_path, {"input_ids": 3})
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write the records"):
        RecordWriter(tmp_path / "file" / "a.mindrecord", {"input_ids": 3})


def write_ones(path: Path, count: int, shards: int = 1) -> None:
    with RecordWriter(path, {"input_ids": 3}, num_shards=shards) as writer:
        writer.write_rows({"input_ids": np.full((count, 3), count, np.int32)})


def test_an_old_file_stays_until_the_new_one_is_whole_and_goes_with_its_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    write_ones(path, 4, shards=3)
    with RecordWriter(path, {"input_ids": 3}) as writer:
        writer.write_rows({"input_ids": np.zeros((5, 3), np.int32)})
        assert RecordFile(path).num_records == 4
        assert RecordFile(tmp_path).num_records == 4, "the unfinished file is seen"
    assert sorted(os.listdir(tmp_path)) == ["a.mindrecord", "a.mindrecord.db", "a.mindrecord.manifest.json"]
    assert RecordFile(path).num_records == 5


def test_files_are_as_open_to_others_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_ones(tmp_path / "a.mindrecord", 4)
    finally:
        os.umask(old)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in os.listdir(tmp_path)} == {0o640}


def test_a_damaged_manifest_can_be_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    write_ones(path, 4)
    Path(f"{path}.manifest.json").write_text("{")
    with pytest.raises(UserError, match="a.mindrecord.manifest.json: unreadable manifest"):
        RecordFile(path)
    write_ones(path, 5)
    assert RecordFile(path).num_records == 5


def test_two_writers_of_one_target(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    first = RecordWriter(path, {"input_ids": 3})
    second = RecordWriter(path, {"input_ids": 3})
    for writer, count in ((first, 2), (second, 3)):
        writer.write_rows({"input_ids": np.zeros((count, 3), np.int32)})
    first.close()
    assert RecordFile(path).num_records == 2
    second.close()
    assert RecordFile(path).num_records == 3
    assert RecordFile(path).verify() == 2
    assert len(os.listdir(tmp_path)) == 3


WRITE_FOREVER = """
import sys
import numpy as np
from llm_core.data.records import RecordWriter
with RecordWriter(sys.argv[1], {"input_ids": 257}) as writer:
    print("started", flush=True)
    while True:
        writer.write_rows({"input_ids": np.ones((500, 257), np.int32)})
"""


def test_a_killed_writer_leaves_nothing_under_the_name_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].startswith(".a.mindrecord.writing-")
    with pytest.raises(UserError, match="no \\*.mindrecord in this folder"):
        RecordFile(tmp_path)
    write_ones(path, 2)
    assert sorted(os.listdir(tmp_path)) == ["a.mindrecord", "a.mindrecord.db", "a.mindrecord.manifest.json"]


def test_a_stop_between_the_moves_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mindrecord"
    write_ones(path, 4)
    replace = os.replace

    def stop_at_index(source: Path, target: Path) -> None:
        if str(target).endswith(".db"):
            raise OSError("stopped here")
        replace(source, target)

    monkeypatch.setattr(record_writer.os, "replace", stop_at_index)
    with pytest.raises(EnvironmentFault, match="stopped here"):
        write_ones(path, 4)
    with pytest.raises(UserError, match="writer was stopped while it moved"):
        RecordFile(path)
    monkeypatch.undo()
    write_ones(path, 6)
    assert RecordFile(path).num_records == 6


WRITE_UNDER_A_LIMIT = """
import resource, sys
import numpy as np
from llm_core.data.records import RecordWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (17 << 20, 17 << 20))
with RecordWriter(sys.argv[1], {"input_ids": 257}) as writer:
    writer.write_rows({"input_ids": np.ones((5000, 257), np.int32)})
"""


def test_a_write_that_mindspore_does_not_see_failing(tmp_path: Path) -> None:
    """A limit on the file size stands for a quota: MindSpore goes on as if nothing were lost."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_UNDER_A_LIMIT, str(tmp_path / "a.mindrecord")],
        cwd=ROOT, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert "EnvironmentFault" in done.stderr and "a.mindrecord: cannot write the records" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_writer, "_LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(EnvironmentFault, match="a.mindrecord: cannot write.*MiB free.*the disk is full"):
        write_ones(tmp_path / "a.mindrecord", 4)
    assert os.listdir(tmp_path) == []


def remove_index(path: Path) -> None:
    Path(f"{path}.db").unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def empty_index(path: Path) -> None:
    Path(f"{path}.db").write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" * 1000)


def text(path: Path) -> None:
    path.write_text("not records at all")


def truncate(path: Path) -> None:
    os.truncate(path, (16 << 20) + 5000)


def foreign_index(path: Path) -> None:
    Path(f"{path}.db").write_bytes(b"SQLite format 3\0" + b"x" * 5000)


DAMAGE = {
    remove_index: "train.mindrecord: its index train.mindrecord.db is missing",
    empty: "train.mindrecord: empty",
    foreign: "train.mindrecord: not a MindRecord",
    text: "train.mindrecord: not a MindRecord",
    truncate: "train.mindrecord: truncated",
    empty_index: "train.mindrecord.db: not the index",
    foreign_index: "train.mindrecord.db: not the index",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_damage_is_seen_at_open(copied: Path, damage: Callable[[Path], None], with_manifest: bool) -> None:
    if not with_manifest:
        Path(f"{copied}.manifest.json").unlink()
    damage(copied)
    with pytest.raises(UserError, match=str(copied.parent)) as error:
        RecordFile(copied)
    if not with_manifest:
        assert DAMAGE[damage] in str(error.value)


def test_index_of_another_file(copied: Path, tmp_path: Path) -> None:
    write_ones(tmp_path / "other" / "train.mindrecord", 3)
    os.replace(tmp_path / "other" / "train.mindrecord.db", f"{copied}.db")
    Path(f"{copied}.manifest.json").unlink()
    with pytest.raises(UserError, match="530 records and its index train.mindrecord.db 3"):
        RecordFile(copied)


def test_a_flipped_bit_is_found_by_verify(copied: Path) -> None:
    with open(copied, "r+b") as file:
        file.seek((16 << 20) + 27)  # inside a value
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(UserError, match="train.mindrecord: damaged: its sha256"):
        RecordFile(copied).verify()


def test_a_flipped_length_is_found_by_reading(copied: Path) -> None:
    with open(copied, "r+b") as file:
        file.seek(16 << 20)
        file.write(b"\x01")
    with pytest.raises(UserError, match="record 0 is damaged"):
        RecordFile(copied)


def test_records_of_different_length_are_refused(tmp_path: Path) -> None:
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(tmp_path / "a.mindrecord"), 1)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "uneven")
    writer.write_raw_data([{"input_ids": np.arange(n, dtype=np.int32)} for n in (4, 4, 5)])
    writer.commit()
    with pytest.raises(UserError, match="record 2 has 5 input_ids, the first record 4"):
        RecordFile(tmp_path).read(np.arange(3))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        RecordFile(tmp_path / "absent.mindrecord")
    with pytest.raises(UserError, match="no \\*.mindrecord in this folder"):
        RecordFile(tmp_path)


def test_different_columns_in_one_folder(copied: Path) -> None:
    write_ones(copied.parent / "other.mindrecord", 3)
    with pytest.raises(UserError, match="must have the same columns"):
        RecordFile(copied.parent)


def test_a_failing_disk(records: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("llm_core.data.mindrecord.os.pread", fail)
    with pytest.raises(EnvironmentFault, match="train.mindrecord: cannot read: Input/output error"):
        records.read(np.arange(3))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(copied: Path) -> None:
    copied.chmod(0)
    with pytest.raises(EnvironmentFault, match="train.mindrecord: cannot read: Permission denied"):
        RecordFile(copied)
