"""Checkpoints of a run: whole or absent, pruned as asked, damage found."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from llm_core.checkpoint.lock import lock_output_dir
from llm_core.checkpoint.staged import StagedFile
from llm_core.checkpoint.store import CheckpointStore
from llm_core.checkpoint.weights import read_weights
from llm_core.errors import EnvironmentFault, UserError


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    return {
        "model.norm_out.weight": weight,
        "adam_m.model.norm_out.weight": weight.T,
        "adam_v.model.norm_out.weight": weight[:, 1:],
        "global_step": np.array(seed, np.int32),
    }


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


@pytest.mark.parametrize("file_format", ["safetensors", "ckpt"])
def test_what_is_saved_is_read_back(tmp_path, file_format):
    store = CheckpointStore(tmp_path, "llama", file_format=file_format)
    saved = tensors()
    path = store.save(2, 7, saved, {"loss_scale": 1024.0, "cursor": [1, 5]}, metric=3.5)
    assert path == tmp_path / f"checkpoint/rank_0/llama_rank_0-2_7.{file_format}"
    meta = json.loads((path.parent / "meta.json").read_text())
    assert meta == {"last_epoch": 2, "last_step": 7, "last_ckpt_file": path.name}
    again = CheckpointStore(tmp_path, "llama", file_format=file_format)
    assert again.latest() == path
    back, state, epoch, step = again.read(path)
    assert (state, epoch, step) == ({"loss_scale": 1024.0, "cursor": [1, 5]}, 2, 7)
    assert back.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_nothing_saved_yet(tmp_path):
    store = CheckpointStore(tmp_path / "absent", "llama")
    assert store.latest() is None and store.best() is None
    assert not (tmp_path / "absent").exists()


def test_keep_max(tmp_path):
    store = CheckpointStore(tmp_path, "llama", keep_max=2)
    for step in (1, 9, 10, 11):
        store.save(1, step, tensors(step))
    kept = ["llama_rank_0-1_10.safetensors", "llama_rank_0-1_11.safetensors"]
    assert names(store) == sorted([*kept, *(f"{name}.manifest.json" for name in kept), "meta.json"])


def test_the_best_outlives_keep_max(tmp_path):
    store = CheckpointStore(tmp_path, "llama", keep_max=1, keep_best="eval_loss")
    for step, loss in enumerate((3.0, 2.0, float("nan"), 2.5, 2.6)):
        store.save(1, step, tensors(step), metric=loss)
    assert store.best().name == "llama_rank_0-1_1.safetensors"
    assert store.latest().name == "llama_rank_0-1_4.safetensors"
    assert len([name for name in names(store) if name.endswith(".safetensors")]) == 2
    pointer = json.loads((store.folder / "llama_rank_0-best.json").read_text())
    assert pointer == {"file": "llama_rank_0-1_1.safetensors", "metric": "eval_loss", "value": 2.0}
    again = CheckpointStore(tmp_path, "llama", keep_max=1, keep_best="eval_loss")
    again.save(1, 5, tensors(5), metric=1.0)
    assert again.best().name == "llama_rank_0-1_5.safetensors"


def test_a_new_run_has_a_best_of_its_own(tmp_path):
    earlier = CheckpointStore(tmp_path, "llama", keep_best="eval_loss")
    earlier.save(1, 1, tensors(), metric=0.5)
    store = CheckpointStore(tmp_path, "llama", keep_best="eval_loss")
    assert store.begin() == 1
    assert store.best() is None
    path = store.save(1, 2, tensors(), metric=0.7)
    assert store.best() == path


def test_keep_per_minutes(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, "[llama]", keep_max=2, keep_per_minutes=10)
    for step, minute in enumerate((0, 3, 9, 11, 19, 25, 27, 28)):
        monkeypatch.setattr("llm_core.checkpoint.store.time.time", lambda minute=minute: 60.0 * minute + 6e6)
        store.save(1, step, tensors(step))
    assert [n for n in names(store) if n.endswith(".safetensors")] == [
        f"[llama]_rank_0-1_{step}.safetensors" for step in (0, 3, 5, 6, 7)
    ]


def test_weights_alone_on_request(tmp_path):
    store = CheckpointStore(tmp_path, "llama", keep_max=1, save_network_params=True)
    both = tensors() | {"lora": np.ones(2, np.float32), "adam_m.lora": np.ones(2, np.float32)}
    store.save(1, 1, both, trainable={"lora"})
    store.save(1, 2, both, trainable={"lora"})
    for folder, wanted in (("network", ["model.norm_out.weight", "lora"]), ("trainable", ["lora"])):
        files = list((tmp_path / f"checkpoint_{folder}/rank_0").glob("*.safetensors"))
        assert [file.name for file in files] == ["llama_rank_0-1_2.safetensors"]
        assert list(read_weights(files[0])) == wanted


def test_two_ranks_have_their_own_folders(tmp_path):
    for rank in (0, 1):
        store = CheckpointStore(tmp_path, "llama", rank=rank)
        assert store.save(1, 1, tensors(rank)).name == f"llama_rank_{rank}-1_1.safetensors"
        np.testing.assert_array_equal(store.read(store.latest())[0]["global_step"], rank)


def flip_bit(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip_bit, truncate])
@pytest.mark.parametrize("file_format", ["safetensors", "ckpt"])
def test_a_damaged_checkpoint_is_found_and_passed_over(tmp_path, capsys, damage, file_format):
    store = CheckpointStore(tmp_path, "llama", file_format=file_format)
    first, second = (store.save(1, step, tensors(step)) for step in (1, 2))
    damage(second)
    fresh = CheckpointStore(tmp_path, "llama", file_format=file_format)
    assert fresh.latest() == first
    said = capsys.readouterr()
    assert second.name in said.out + said.err and first.name in said.out + said.err
    with pytest.raises(UserError, match=f"{second.name}.*damaged"):
        fresh.read(second)
    with pytest.raises(UserError, match=rf"{second.name}.*(damaged|cut short)"):
        read_weights(tmp_path)
    damage(first)
    with pytest.raises(UserError, match="no whole checkpoint"):
        CheckpointStore(tmp_path, "llama").latest()


def test_a_checkpoint_damaged_under_the_same_store_is_noticed(tmp_path):
    store = CheckpointStore(tmp_path, "llama")
    path = store.save(1, 1, tensors())
    store.read(path)
    flip_bit(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="damaged"):
        store.read(path)


@pytest.mark.parametrize("content", ["[]", '{"versions": [{"x": 1}]}', '{"versions": [{"sha256": "", "size": "1"}]}'])
def test_a_damaged_manifest_is_damage(tmp_path, content):
    store = CheckpointStore(tmp_path, "llama", keep_best="eval_loss")
    first, second = (store.save(1, step, tensors(step), metric=1.0) for step in (1, 2))
    second.with_name(f"{second.name}.manifest.json").write_text(content)
    (store.folder / "llama_rank_0-best.json").write_text(content)
    fresh = CheckpointStore(tmp_path, "llama", keep_best="eval_loss")
    assert fresh.latest() == first
    with pytest.raises(UserError, match="manifest"):
        fresh.read(second)
    assert fresh.save(1, 3, tensors(3), metric=9.0) == fresh.latest() == fresh.best()


def test_a_lost_meta_json_and_a_lost_newest_file(tmp_path):
    store = CheckpointStore(tmp_path, "llama")
    first, second = (store.save(1, step, tensors(step)) for step in (9, 10))
    (store.folder / "meta.json").unlink()
    assert store.latest() == second
    second.unlink()
    assert CheckpointStore(tmp_path, "llama").latest() == first


def test_going_back_to_an_older_step_makes_that_line_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, "llama", keep_max=2)
    for step in (1, 2, 3):
        store.save(1, step, tensors(step))
    store.save(1, 2, tensors(20))
    assert store.latest().name == "llama_rank_0-1_2.safetensors"
    np.testing.assert_array_equal(store.read(store.latest())[0]["global_step"], 20)
    (store.folder / "meta.json").unlink()
    assert CheckpointStore(tmp_path, "llama").latest().name == "llama_rank_0-1_2.safetensors"


@pytest.mark.parametrize("renames", range(1, 5))
def test_death_between_any_two_renames_of_a_repeated_save(tmp_path, monkeypatch, renames):
    """A save that replaces a checkpoint of the same name (after a rollback) is atomic, too."""
    store = CheckpointStore(tmp_path, "llama", keep_max=1)
    store.save(1, 1, tensors(1), {"try": 1})
    done = []

    class Killed(BaseException):
        pass

    real = os.replace

    def replace(source, target):
        if len(done) == renames - 1:
            raise Killed
        done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("llm_core.checkpoint.staged.os.replace", replace)
        with pytest.raises(Killed):
            store.save(1, 1, tensors(2), {"try": 2})
    again = CheckpointStore(tmp_path, "llama")
    back, state, _, _ = again.read(again.latest())
    assert int(back["global_step"]) == state["try"] == (1 if renames < 3 else 2)


def test_leftovers_of_a_killed_run_are_removed_by_the_next_save(tmp_path):
    store = CheckpointStore(tmp_path, "llama")
    store.save(1, 1, tensors())
    stale = store.folder / ".llama_rank_0-1_2.safetensors.999.tmp"
    stale.write_bytes(b"half")
    orphan = store.folder / "llama_rank_0-1_2.safetensors.manifest.json"
    orphan.write_text("{}")
    reader = CheckpointStore(tmp_path, "llama")
    assert reader.latest() and stale.exists()
    reader.save(1, 3, tensors())
    assert not stale.exists() and not orphan.exists()


def test_a_checkpoint_of_mindspores_own(tmp_path):
    import mindspore as ms

    folder = tmp_path / "checkpoint/rank_0"
    folder.mkdir(parents=True)
    ms.save_checkpoint([{"name": "w", "data": ms.Tensor([1.0, 2.0])}], str(folder / "llama_rank_0-3_4.ckpt"))
    store = CheckpointStore(tmp_path, "llama")
    back, state, epoch, step = store.read(store.latest())
    assert (state, epoch, step) == ({}, 3, 4)
    np.testing.assert_array_equal(back["w"], np.array([1, 2], np.float32))


def test_what_no_run_of_ours_has_saved_is_not_deleted(tmp_path):
    """MindFormers' own checkpoints, of several ranks, in the folder that a run saves into."""
    theirs = []
    for rank in (0, 1):
        for kind in ("checkpoint", "checkpoint_network"):
            folder = tmp_path / kind / f"rank_{rank}"
            folder.mkdir(parents=True)
            theirs += [folder / f"llama_rank_{rank}-1_{step}.ckpt" for step in (100, 200)]
    for path in theirs:
        path.write_bytes(b"theirs")
    store = CheckpointStore(tmp_path, "llama", keep_max=1, save_network_params=True)
    for step in (1, 2):
        store.save(1, step, tensors(step))
    assert all(path.exists() for path in theirs)
    for kind in ("checkpoint", "checkpoint_network"):
        assert [path.name for path in (tmp_path / kind / "rank_0").glob("*.safetensors")] == [
            "llama_rank_0-1_2.safetensors"
        ]


def test_a_failed_save_leaves_nothing_of_itself(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, "llama", save_network_params=True)
    store.save(1, 1, tensors())
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    usage = shutil.disk_usage(tmp_path)

    def room(folder):
        return usage._replace(free=usage.free if "network" in str(folder) else 0)

    monkeypatch.setattr("llm_core.checkpoint.staged.shutil.disk_usage", room)
    with pytest.raises(EnvironmentFault, match="no room on the disk"):
        store.save(1, 2, tensors())
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, "llama")
    first = store.save(1, 1, tensors())
    before = names(store)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("llm_core.checkpoint.staged.shutil.disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentFault, match=r"llama_rank_0-1_2\.safetensors.*needed.*100 bytes free"):
        store.save(1, 2, tensors())
    assert names(store) == before
    assert CheckpointStore(tmp_path, "llama").latest() == first


def test_a_disk_that_fills_while_writing(tmp_path):
    """A real refusal by the kernel: this process may not write files above 256 KiB."""
    store = CheckpointStore(tmp_path, "llama")
    first = store.save(1, 1, tensors())
    before = names(store)
    import signal

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match=r"llama_rank_0-1_2\.safetensors.*no room"):
            store.save(1, 2, {"w": np.ones(1 << 18, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(store) == before
    assert CheckpointStore(tmp_path, "llama").latest() == first


def test_a_full_file_system(tmp_path):
    """A real 1 MiB file system, where mounting is allowed: the free room is seen, and the last checkpoint lives."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting needs root")
    try:
        store = CheckpointStore(mount, "llama", keep_max=0)
        weights = {"w": np.ones(50_000, np.float32)}
        with pytest.raises(EnvironmentFault, match="no room on the disk"):
            for step in range(20):
                store.save(1, step, weights)
        assert step >= 2
        again = CheckpointStore(mount, "llama")
        assert again.read(again.latest())[3] == step - 1
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="file"):
        CheckpointStore(tmp_path / "file", "llama").save(1, 1, tensors())
    with pytest.raises(EnvironmentFault, match="file"):
        with lock_output_dir(tmp_path / "file"):
            pass


def test_an_unknown_format(tmp_path):
    with pytest.raises(UserError, match="'pt'"):
        CheckpointStore(tmp_path, "llama", file_format="pt")


def test_the_lock_names_the_other_process(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
            from llm_core.checkpoint.lock import lock_output_dir
            with lock_output_dir({str(tmp_path)!r}):
                print("held", flush=True)
                input()
        """)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"process {holder.pid} "):
        with lock_output_dir(tmp_path):
            pass
    with lock_output_dir(tmp_path, rank=1):
        pass
    holder.kill()
    holder.wait()
    with lock_output_dir(tmp_path) as folder:
        assert folder == tmp_path


def test_a_failed_write_leaves_no_temporary_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with StagedFile(tmp_path / "a", 10) as staged:
            staged.write(b"12345")
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
