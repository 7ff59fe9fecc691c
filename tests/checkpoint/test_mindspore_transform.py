"""MindSpore's own ms.transform_checkpoints reads our ranks' .ckpt and strategy files, and we read what it writes."""

import mindspore as ms
import numpy as np
import pytest
from checkpoint_samples import assert_same, write
from layout_samples import LAYOUTS, SPECS, parts, shares, whole_tensors

from llm_core.checkpoint.weights import open_weights


def rank_files(folder, spec, layout, tensors):
    """What the ranks leave, with the strategy as one file: MindSpore's merge of theirs. Returns (folder, strategy)."""
    for share in shares(spec, layout):
        held = parts(tensors, share)
        path = folder / f"rank_{share.rank}" / f"m_{share.rank}.ckpt"
        path.parent.mkdir(parents=True)
        write(path, held)
        share.save_strategy(folder, {name: array.shape for name, array in held.items()})
    ms.merge_pipeline_strategys(str(folder / "strategy"), str(folder / "merged.ckpt"))
    return folder, str(folder / "merged.ckpt")


# sources and targets that use every form: cuts over tp, key/value heads held twice, ZeRO on top, stages
PAIRS = [
    ("one", "dp2_tp4_zero3"), ("dp2_tp4_zero3", "one"), ("dp2_zero3", "tp2_pp2"), ("tp4", "dp4_zero1"),
    ("tp2_pp2", "dp2_tp2_zero1"), ("dp2_pp2_zero3", "tp4"), ("dp2_tp2_zero3", "pp4"), ("pp4", "dp2_pp2"),
]  # fmt: skip


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_mindspore_transforms_our_files(tmp_path, family, source, target):
    spec = SPECS[family]
    tensors = {name: array for name, array in whole_tensors(spec).items() if array.ndim}
    from_folder, from_strategy = rank_files(tmp_path / "a", spec, LAYOUTS[source], tensors)
    _, to_strategy = rank_files(tmp_path / "b", spec, LAYOUTS[target], tensors)
    out = tmp_path / "out"
    ms.transform_checkpoints(str(from_folder), str(out), "t_", from_strategy, to_strategy)
    for share in shares(spec, LAYOUTS[target]):
        found = ms.load_checkpoint(str(out / f"rank_{share.rank}" / f"t_{share.rank}.ckpt"))
        held = parts(tensors, share)
        assert found.keys() == held.keys()
        for name, array in held.items():
            np.testing.assert_array_equal(found[name].asnumpy(), array, err_msg=f"rank {share.rank} {name}")
    assert_same(read_weights_by(out, to_strategy), tensors)


def read_weights_by(folder, strategy):
    weights = open_weights(folder, strategy)
    try:
        return dict(weights)
    finally:
        weights.close()
