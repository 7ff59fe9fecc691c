"""Checkpoints that several ranks save together: whole on all of them or not there, read by any layout."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from checkpoint_samples import assert_same
from layout_samples import LAYOUTS, SPECS, parts, whole_tensors
from rank_stores import on_all, save_all, stores

from llm_core.checkpoint import staged
from llm_core.checkpoint import store as store_module
from llm_core.checkpoint.store import CheckpointStore
from llm_core.checkpoint.strategy import read_strategy
from llm_core.checkpoint.weights import read_weights
from llm_core.errors import EnvironmentFault, UserError

SPEC = SPECS["llama"]
TENSORS = whole_tensors(SPEC)


def steps_kept(folder, rank=0):
    files = (folder / f"checkpoint/rank_{rank}").glob("*.safetensors")
    return sorted(int(path.stem.rpartition("_")[2]) for path in files)


@pytest.mark.parametrize("file_format", ["safetensors", "ckpt"])
def test_each_rank_gets_its_parts_back_and_another_layout_its_own(tmp_path, file_format):
    every = stores(tmp_path, LAYOUTS["dp2_tp2_zero1"], file_format=file_format)
    path = save_all(every, 3, TENSORS)
    assert path == tmp_path / f"checkpoint/rank_0/m_rank_0-1_3.{file_format}"
    assert read_strategy(tmp_path / "strategy").ranks == 4
    for name in ("dp2_tp2_zero1", "pp4", "dp2_zero3"):
        again = stores(tmp_path, LAYOUTS[name])
        assert on_all(again, lambda store: store.latest()) == [path] * LAYOUTS[name].world
        for store, (tensors, state, epoch, step) in zip(again, on_all(again, lambda s: s.read(path)), strict=True):
            assert (state["step"], epoch, step) == (3, 1, 3)
            assert_same(tensors, parts(TENSORS, store.share))
    alone = CheckpointStore(tmp_path, "m")
    assert alone.latest() == path
    assert_same(alone.read(path)[0], TENSORS)
    assert_same(read_weights(tmp_path), TENSORS)


def test_one_process_checkpoint_goes_on_as_several(tmp_path):
    alone = CheckpointStore(tmp_path, "m")
    path = alone.save(1, 3, TENSORS, {"step": 3})
    every = stores(tmp_path, LAYOUTS["tp2_pp2"], keep_max=1)
    assert on_all(every, lambda store: store.latest()) == [path] * 4
    for store, (tensors, *_) in zip(every, on_all(every, lambda s: s.read(path)), strict=True):
        assert_same(tensors, parts(TENSORS, store.share))
    save_all(every, 4, TENSORS)
    assert steps_kept(tmp_path) == [4]
    alone = CheckpointStore(tmp_path, "m", keep_max=1)
    alone.save(1, 5, TENSORS, {})
    assert steps_kept(tmp_path) == [5]
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["rank_0"]  # nothing of the other ranks


def test_the_step_before_is_taken_where_one_rank_has_not_saved(tmp_path):
    """Missing, damaged, or of another save of the same name."""
    every = stores(tmp_path, LAYOUTS["tp2"])
    first, second = save_all(every, 1, TENSORS), save_all(every, 2, TENSORS)
    other = tmp_path / "checkpoint/rank_1/m_rank_1-1_2.safetensors"
    content, manifest = other.read_bytes(), Path(f"{other}.manifest.json")
    assert CheckpointStore(tmp_path, "m").latest() == second
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert on_all(stores(tmp_path, LAYOUTS["tp2"]), lambda store: store.latest()) == [first] * 2
    assert CheckpointStore(tmp_path, "m").latest() == first
    other.write_bytes(content)
    manifest.write_text(manifest.read_text().replace('"save": "', '"save": "x'))
    assert on_all(stores(tmp_path, LAYOUTS["tp2"]), lambda store: store.latest()) == [first] * 2
    other.unlink()
    assert on_all(stores(tmp_path, LAYOUTS["tp2"]), lambda store: store.latest()) == [first] * 2
    (tmp_path / "checkpoint/rank_1/m_rank_1-1_1.safetensors").unlink()
    with pytest.raises(UserError, match="no whole checkpoint: .*rank 1 of the 2 .* is missing"):
        CheckpointStore(tmp_path, "m").latest()


def test_a_named_checkpoint_is_verified_on_all_ranks(tmp_path):
    path = save_all(stores(tmp_path, LAYOUTS["tp2"]), 1, TENSORS)
    other = tmp_path / "checkpoint/rank_1/m_rank_1-1_1.safetensors"
    other.write_bytes(other.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="m_rank_1-1_1.safetensors: damaged"):
        stores(tmp_path, LAYOUTS["dp2"])[0].read(path)


def test_a_fault_on_one_rank_is_one_on_all(tmp_path, monkeypatch):
    every = stores(tmp_path, LAYOUTS["tp2"], keep_max=1)
    first = save_all(every, 1, TENSORS)
    usage = shutil.disk_usage(tmp_path)

    def room(folder):
        return usage._replace(free=0 if "rank_1" in str(folder) else usage.free)

    monkeypatch.setattr(staged.shutil, "disk_usage", room)

    def save(store):
        with pytest.raises(EnvironmentFault) as fault:
            store.save(1, 2, parts(TENSORS, store.share), {})
        return str(fault.value)

    said = on_all(every, save)
    assert said[0].startswith("rank 1 could not save: ") and "no room on the disk" in said[1]
    assert steps_kept(tmp_path) == steps_kept(tmp_path, 1) == [1]  # what rank 0 had written of it is gone
    monkeypatch.undo()
    assert on_all(stores(tmp_path, LAYOUTS["tp2"]), lambda store: store.latest()) == [first] * 2
    save_all(every, 3, TENSORS)
    assert steps_kept(tmp_path) == steps_kept(tmp_path, 1) == [3]


def test_ranks_that_do_not_see_the_same_folder_are_told(tmp_path, monkeypatch):
    """Two machines with a disk of their own each: nothing that is saved there could be read again."""
    monkeypatch.setattr("llm_core.checkpoint.store._SEEN_SECONDS", 0.2)
    near, far = stores(tmp_path / "near", LAYOUTS["tp2"])
    far.folder = tmp_path / "far/checkpoint/rank_1"

    def save(store):
        with pytest.raises(EnvironmentFault) as fault:
            store.save(1, 1, parts(TENSORS, store.share), {})
        return str(fault.value)

    said = on_all([near, far], save)
    assert "rank 1 of the 2 that saved this checkpoint is missing" in said[0]
    assert all("output_dir has to be a folder that all ranks see" in line for line in said)
    assert not (near.folder / "meta.json").exists()


def test_a_file_that_comes_into_sight_late_is_waited_for(tmp_path, monkeypatch):
    """As over NFS."""
    every = stores(tmp_path, LAYOUTS["tp2"])
    real, looks = store_module.paths_of_save, []

    def late(path):
        looks.append(path)
        if len(looks) == 1:
            raise UserError("not yet")
        return real(path)

    monkeypatch.setattr("llm_core.checkpoint.store.paths_of_save", late)
    path = save_all(every, 1, TENSORS)
    assert looks == [path, path]
    save_all(every, 2, TENSORS)
    assert len(looks) == 2  # once is enough


def test_all_ranks_keep_the_same(tmp_path):
    every = stores(tmp_path, LAYOUTS["dp4"], keep_max=2, keep_best="eval_loss", save_network_params=True)
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5), 1):
        save_all(every, step, TENSORS, metric=loss)
    assert [steps_kept(tmp_path, rank) for rank in range(4)] == [[2, 3, 4]] * 4
    assert {store.best().name for store in every} == {f"m_rank_{rank}-1_2.safetensors" for rank in range(4)}
    fewer = stores(tmp_path, LAYOUTS["dp2"], keep_max=2)
    for step in (5, 6):
        save_all(fewer, step, TENSORS)
    assert [steps_kept(tmp_path, rank) for rank in range(4)] == [[2, 5, 6], [2, 5, 6], [2], [2]]
    weights = read_weights(tmp_path / "checkpoint_network")
    assert weights.keys() == {name for name in TENSORS if name != "global_step" and not name.startswith("adam_m.")}


SAVING = """
import sys
sys.path.insert(0, "tests/checkpoint")
from pathlib import Path
import numpy as np
from layout_samples import LAYOUTS, SPECS, whole_tensors
from rank_stores import on_all, save_all, stores

every = stores(sys.argv[1], LAYOUTS[sys.argv[2]], keep_max=1)
last = on_all(every, lambda store: store.latest())[0]
step = 0 if last is None else int(last.stem.rpartition("_")[2])
like = whole_tensors(SPECS["llama"])
while True:
    step += 1
    save_all(every, step, {name: np.full_like(array, step) for name, array in like.items()})
    print(step, flush=True)
"""


def test_a_kill_while_every_rank_saves_loses_no_finished_step(tmp_path):
    """Layouts change between the runs; at most one checkpoint is kept."""
    moments, finished = random.Random(5), 0
    for name in ("tp2", "dp2_zero3", "pp2", "tp2", "one", "tp2_pp2"):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(tmp_path), name],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        first = process.stdout.readline()
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        finished = max(int(line) for line in [first, *process.stdout.read().split()])
        process.wait()
        store = CheckpointStore(tmp_path, "m")
        tensors, state, _, step = store.read(store.latest())
        assert finished <= step <= finished + 1 and state["step"] == step
        assert tensors.keys() == TENSORS.keys()
        for array in tensors.values():
            np.testing.assert_array_equal(array, np.full_like(array, step))


def test_mindspore_reads_what_the_ranks_saved(tmp_path):
    """ms.transform_checkpoints on the folders of a run, as they are, to one file."""
    every = stores(tmp_path, LAYOUTS["dp2_pp2_zero1"], file_format="ckpt")
    tensors = {name: array for name, array in TENSORS.items() if array.ndim}
    save_all(every, 1, tensors)
    ms.merge_pipeline_strategys(str(tmp_path / "strategy"), str(tmp_path / "merged.ckpt"))
    ms.transform_checkpoints(str(tmp_path / "checkpoint"), str(tmp_path / "out"), "t_", str(tmp_path / "merged.ckpt"))
    found = ms.load_checkpoint(str(tmp_path / "out/rank_0/t_0.ckpt"))
    assert_same({name: parameter.asnumpy() for name, parameter in found.items()}, tensors)
