"""Checkpoints of several ranks: any layout read as whole tensors and as any other layout's parts, bit by bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import assert_same
from layout_samples import LAYOUTS, SPECS, Memory, adapter, parts, shares, whole_tensors

from llm_core.checkpoint.dtypes import head_of
from llm_core.checkpoint.files import read_heads, write_tensors
from llm_core.checkpoint.manifest import Version, commit_with_manifest
from llm_core.checkpoint.reshard import SHARDS, RankFiles, extent, full
from llm_core.checkpoint.staged import StagedFile
from llm_core.checkpoint.strategy import layout_of, read_strategy, write_strategy
from llm_core.checkpoint.transform import LayoutTarget, OneFile, transform
from llm_core.checkpoint.weights import open_weights, read_weights
from llm_core.errors import UserError
from llm_core.parallel.cuts import cut_parameters


def in_memory(spec, layout, tensors):
    """The files of all ranks of a layout, as one."""
    every = shares(spec, layout)
    files = [Memory(Path(f"rank_{share.rank}"), parts(tensors, share)) for share in every]

    def place(rank, name, head):
        whole = every[rank].whole(name) or head.shape
        return whole, every[rank].box(name, whole)

    return RankFiles(files, place)


@pytest.mark.parametrize("family", SPECS)
def test_every_layout_from_every_other(family):
    """Each rank's parts come out bit-equal from the files of any layout; so A -> B -> A is the identity."""
    spec = SPECS[family]
    tensors = whole_tensors(spec)
    wanted = {name: [(share, parts(tensors, share)) for share in shares(spec, layout)]
              for name, layout in LAYOUTS.items()}  # fmt: skip
    for source, layout in LAYOUTS.items():
        files = in_memory(spec, layout, tensors)
        assert files.heads == {name: head_of(array) for name, array in tensors.items()}
        assert_same({name: files.read(name) for name in files.heads}, tensors)
        for target, every in wanted.items():
            for share, held in every:
                boxes = {name: share.box(name, head.shape) for name, head in files.heads.items()}
                assert {name for name, box in boxes.items() if box is not None} == held.keys()
                for name, array in held.items():
                    got = files.read_part(name, boxes[name])
                    assert got.shape == array.shape and np.array_equal(got, array), (source, target, share.rank, name)


def save_ranks(folder, spec, layout, tensors, save="s", suffix=".safetensors", state=None):
    """The files that the ranks of a run leave, with their manifests."""
    paths = []
    for share in shares(spec, layout):
        held = parts(tensors, share)
        heads = {name: head_of(array) for name, array in held.items()}
        path = folder / f"rank_{share.rank}" / f"m_rank_{share.rank}-1_5{suffix}"
        shards = share.shards(f"m_rank_{{rank}}-1_5{suffix}", save, heads)
        with StagedFile(path, 0) as staged:
            write_tensors(staged, heads, held.__getitem__, {})
            version = Version(staged.sha256, staged.size, 1, 5, state={SHARDS: shards, **(state or {})})
            commit_with_manifest(staged, version)
        paths.append(path)
    return paths


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_of_ranks_are_loaded_whole(tmp_path, suffix):
    spec = SPECS["llama"]
    tensors = whole_tensors(spec)
    paths = save_ranks(tmp_path, spec, LAYOUTS["dp2_tp2_zero3"], tensors, suffix=suffix)
    for place in (tmp_path, tmp_path / "rank_0", paths[2]):  # whichever of them is named
        assert_same(read_weights(place), tensors)


def test_a_missing_damaged_or_foreign_rank_is_named(tmp_path):
    spec, layout = SPECS["falcon"], LAYOUTS["tp4"]
    tensors = whole_tensors(spec)
    paths = save_ranks(tmp_path, spec, layout, tensors)
    content = bytearray(paths[2].read_bytes())
    content[-1] ^= 1
    paths[2].write_bytes(content)
    with pytest.raises(UserError, match=f"{paths[2].name}: damaged"):
        read_weights(tmp_path)
    paths[2].unlink()
    with pytest.raises(UserError, match="rank 2 of the 4 .* is missing"):
        open_weights(tmp_path)
    save_ranks(tmp_path / "other", spec, layout, tensors, save="another")
    for file in (tmp_path / "other" / "rank_2").iterdir():
        file.rename(paths[2].parent / file.name)
    with pytest.raises(UserError, match="rank 2 of the 4 .* is of another save"):
        open_weights(tmp_path)


def test_a_part_that_has_not_the_shape_of_its_rank_is_not_saved():
    share = shares(SPECS["llama"], LAYOUTS["tp2"])[1]
    name = "model.layers.0.attention.wq.weight"
    with pytest.raises(ValueError, match=f"{name} .* on rank 1: "):
        share.shards("f", "s", {name: head_of(np.zeros((16, 16), np.float32))})


def test_state_of_another_shape_goes_along_where_its_parameter_is_whole(tmp_path):
    """Adafactor's sums over rows and columns, which dp and pp leave whole."""
    spec, weight = SPECS["llama"], "model.layers.3.attention.wq.weight"
    tensors = whole_tensors(spec) | {f"adam_row.{weight}": np.arange(16, dtype=np.float32)}
    save_ranks(tmp_path, spec, LAYOUTS["dp2_pp2"], tensors)
    assert_same(read_weights(tmp_path), tensors)
    weights = open_weights(tmp_path)
    transform(weights, LayoutTarget(shares(spec, LAYOUTS["pp4"])), tmp_path / "b")
    with pytest.raises(UserError, match=r"adam_row.* is \[16\] in the file"):
        transform(weights, LayoutTarget(shares(spec, LAYOUTS["tp2"])), tmp_path / "c")
    weights.close()
    assert_same(read_weights(tmp_path / "b"), tensors)
    assert f"adam_row.{weight}" in read_heads(tmp_path / "b" / "rank_3" / "checkpoint_3.ckpt")
    strategy = read_strategy(tmp_path / "b" / "strategy")
    assert strategy.whole(f"adam_row.{weight}", (16,)) == (16,)


def test_another_model_is_refused(tmp_path):
    tensors = whole_tensors(SPECS["llama"])
    save_ranks(tmp_path, SPECS["llama"], LAYOUTS["pp2"], tensors)
    weights = open_weights(tmp_path)
    with pytest.raises(UserError, match="in the file and .* in this model"):
        transform(weights, LayoutTarget(shares(SPECS["falcon"], LAYOUTS["tp2"])), tmp_path / "out")
    weights.close()


@pytest.mark.parametrize("target", ["one", "pp4", "dp2_tp4_zero3"])
def test_transformed_files_are_a_checkpoint_again(tmp_path, target):
    """There and back on disk, the run's state included."""
    spec, layout = SPECS["llama"], LAYOUTS["dp2_pp2_zero1"]
    tensors, state = whole_tensors(spec), {"cursor": {"step": 5}}
    save_ranks(tmp_path / "a", spec, layout, tensors, state=state)
    there = LayoutTarget(shares(spec, LAYOUTS[target])) if target != "one" else OneFile()
    weights = open_weights(tmp_path / "a")
    paths = transform(weights, there, tmp_path / "b", suffix=".safetensors")
    weights.close()
    assert [path.name for path in paths] == [f"checkpoint_{rank}.safetensors" for rank in range(there.ranks)]
    assert_same(read_weights(tmp_path / "b"), tensors)
    weights = open_weights(tmp_path / "b")
    transform(weights, LayoutTarget(shares(spec, layout)), tmp_path / "c")
    weights.close()
    for share in shares(spec, layout):
        weights = open_weights(tmp_path / "c" / f"rank_{share.rank}")
        assert {name: weights.part(name, box).shape for name, box in _boxes(share, weights)} == {
            name: array.shape for name, array in parts(tensors, share).items()
        }
        weights.close()
    assert_same(read_weights(tmp_path / "c"), tensors)


def _boxes(share, weights):
    found = [(name, share.box(name, head.shape)) for name, head in weights.heads.items()]
    return [(name, box) for name, box in found if box is not None]


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strategy_files_say_what_the_cuts_say(tmp_path, family, layout):
    spec, layout = SPECS[family], LAYOUTS[layout]
    names = list(whole_tensors(spec))
    for share in shares(spec, layout):
        stage = layout.place(share.rank).stage
        held = {name: share.whole(name) or () for name in names if share.box(name, share.whole(name)) is not None}
        path = share.save_strategy(tmp_path, held)
        assert path == tmp_path / f"strategy/ckpt_strategy_rank_{share.rank}.ckpt"
        assert stage in range(layout.pp)
    strategy = read_strategy(tmp_path / "strategy")
    assert strategy.ranks == layout.world
    for share in shares(spec, layout):
        for name in names:
            whole = share.whole(name) or ()
            box = share.box(name, whole)
            assert strategy.box(name, share.rank, whole) == box, name
            assert box is None or strategy.whole(name, extent(box)) == whole


def save_strategies(folder, layout):
    """The strategy files of all ranks of a layout of the Llama."""
    shapes = {name: array.shape for name, array in whole_tensors(SPECS["llama"]).items()}
    for share in shares(SPECS["llama"], LAYOUTS[layout]):
        share.save_strategy(folder, {name: shape for name, shape in shapes.items() if share.box(name, shape)})


def test_strategy_files_of_ranks_that_there_are_no_more_go(tmp_path):
    save_strategies(tmp_path, "pp4")
    other = tmp_path / "strategy" / "another_ckpt_strategy_rank_3.ckpt"
    other.write_bytes(b"")
    save_strategies(tmp_path, "pp2")
    own = [path.name for path in (tmp_path / "strategy").iterdir() if path != other]
    assert sorted(own) == ["ckpt_strategy_rank_0.ckpt", "ckpt_strategy_rank_1.ckpt"]
    assert other.exists()


def test_strategy_files_of_two_runs_are_refused(tmp_path):
    for name in ("tp4", "dp4_zero3"):
        save_strategies(tmp_path / name, name)
    mixed = tmp_path / "tp4" / "strategy"
    (mixed / "ckpt_strategy_rank_3.ckpt").write_bytes(
        (tmp_path / "dp4_zero3/strategy/ckpt_strategy_rank_3.ckpt").read_bytes()
    )
    with pytest.raises(UserError, match="rank_3.ckpt: .* is shared out otherwise than in .*: files of several runs"):
        read_strategy(mixed)


def test_one_sharing_in_two_words_is_no_contradiction(tmp_path):
    """MindSpore describes a tied table in the terms of each of its uses."""
    rest = {"field": 0, "opt_weight_shard_step": 0, "opt_weight_shard_size": 0}
    for stage, matrix, axes in ((0, [2, 2], [0, -1]), (1, [2, 1, 2], [[1, 0], -1])):
        tree = {
            "parallel_strategy_item": {"op": {"stage": stage}},
            "parallel_layout_item": {"w": {"dev_matrix": matrix, "tensor_map": axes, **rest}},
        }
        (tmp_path / f"{stage}.json").write_text(json.dumps(tree))
    strategy = read_strategy(tmp_path)
    rows = [slice(0, 4), slice(4, 8)] * 4
    assert [strategy.box("w", rank, (8, 3)) for rank in range(8)] == [(row, slice(0, 3)) for row in rows]


def test_a_tensor_that_the_strategy_does_not_fit_is_refused(tmp_path):
    """No row is left out without a word."""
    item = {"dev_matrix": [3], "tensor_map": [0, -1], "field": 0, "opt_weight_shard_step": 0}
    path = tmp_path / "s.json"
    item["opt_weight_shard_size"] = 0
    path.write_text(json.dumps({"parallel_strategy_item": {}, "parallel_layout_item": {"w": item}}))
    strategy = read_strategy(path)
    assert strategy.box("w", 2, (9, 2)) == (slice(6, 9), slice(0, 2))
    for shape in ((8, 2), (9,), (9, 2, 1)):
        with pytest.raises(UserError, match=rf"s.json: w \[{', '.join(map(str, shape))}\] .* into \[3, 1\] parts"):
            strategy.box("w", 0, shape)


@pytest.mark.parametrize("name", ["{file}", "../rank_1/{file}", "../rank_0/../rank_1/{file}"])
def test_a_file_may_be_named_from_within_its_folder(tmp_path, monkeypatch, name):
    tensors = whole_tensors(SPECS["llama"])
    paths = save_ranks(tmp_path, SPECS["llama"], LAYOUTS["tp2"], tensors)
    monkeypatch.chdir(paths[1].parent)
    assert_same(read_weights(name.format(file=paths[1].name)), tensors)
    assert_same(read_weights("."), tensors)


def test_a_name_from_the_folder_above(tmp_path, monkeypatch):
    tensors = whole_tensors(SPECS["llama"])
    paths = save_ranks(tmp_path, SPECS["llama"], LAYOUTS["tp2"], tensors)
    (paths[1].parent / "inner").mkdir()
    monkeypatch.chdir(paths[1].parent / "inner")
    assert_same(read_weights(f"../{paths[1].name}"), tensors)


def test_upstreams_form_of_zero_is_read(tmp_path):
    """MindSpore's parallel optimizer: the ranks that hold the same part share its rows out, here as JSON."""
    item = {"dev_matrix": [2, 2], "tensor_map": [0, -1], "field": 0, "opt_weight_shard_step": 2}
    path = tmp_path / "merged.json"
    for shards, count, begins in ((2, 4, [0, 4, 2, 6]), (-1, 4, [0, 4, 2, 6]), (0, 2, [0, 4, 0, 4])):
        tree = {"parallel_strategy_item": {}, "parallel_layout_item": {"0-w": item | {"opt_weight_shard_size": shards}}}
        path.write_text(json.dumps(tree))
        strategy = read_strategy(path)
        assert strategy.ranks == 4
        assert strategy.whole("w", (8 // count, 3)) == (8, 3)
        boxes = [strategy.box("w", rank, (8, 3)) for rank in range(4)]
        assert boxes == [(slice(begin, begin + 8 // count), slice(0, 3)) for begin in begins]


def test_a_damaged_strategy_is_named(tmp_path):
    path = tmp_path / "s.ckpt"
    for content in (b"", b"nonsense", b"\x08\x01"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            read_strategy(path)
    with pytest.raises(UserError, match="no strategy file"):
        (tmp_path / "empty").mkdir()
        read_strategy(tmp_path / "empty")
    cut = cut_parameters(SPECS["llama"], LAYOUTS["pp2"])["lm_head.weight"]
    write_strategy(path, {"lm_head.weight": layout_of(cut, LAYOUTS["pp2"], 3)}, 1)
    with pytest.raises(UserError, match="no parameter of pipeline stage 0"):
        read_strategy(path)


def test_the_adapter_of_the_samples_is_cut():
    """The samples are of use only if tensor parallelism and ZeRO cut something of each kind."""
    spec = SPECS["llama"]
    cuts = cut_parameters(spec, LAYOUTS["dp2_tp4_zero3"], adapter(spec))
    assert any(cut.zero and cut.axis == 0 and cut.parts == 2 for cut in cuts.values())
    assert any(cut.zero and cut.axis == 1 for cut in cuts.values())
    assert full((2,)) == (slice(0, 2),)
