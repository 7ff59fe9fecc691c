"""A rank's part of a base and of its adapter, loaded from files of the whole; fingerprints do not depend on the cut."""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

from checkpoint_samples import write  # noqa: E402
from layout_samples import LAYOUTS, SPECS, adapter, parts, shares, whole_tensors  # noqa: E402

from llm_core.checkpoint.weights import load_into  # noqa: E402
from llm_core.errors import UserError  # noqa: E402
from llm_core.peft.adapters import Adapter, base_fingerprint, load_adapter, load_base  # noqa: E402

SPEC = SPECS["llama"]
TENSORS = {name: a for name, a in whole_tensors(SPEC).items() if a.ndim and not name.startswith("adam_m.")}
BASE = {name: a for name, a in TENSORS.items() if "mindpet_delta" not in name}


class Held(nn.Cell):
    """The parameters of a rank, all zero; the base's are frozen."""

    def __init__(self, share, only=""):
        super().__init__(auto_prefix=False)
        self.spec, self.graph_key = SPEC, {}
        self.held = ms.ParameterTuple(
            [ms.Parameter(ms.Tensor(np.zeros_like(array)), name=name, requires_grad="mindpet_delta" in name)
             for name, array in parts(TENSORS, share).items() if name.startswith(only)]
        )  # fmt: skip

    def values(self):
        return {name: parameter.asnumpy() for name, parameter in self.parameters_dict().items()}


@pytest.mark.parametrize("layout", ["one", "tp4", "dp2_tp2_zero3", "tp2_pp2"])
def test_a_rank_loads_its_part_of_base_and_adapter(tmp_path, layout):
    write(tmp_path / "base.safetensors", BASE)
    prints = {}
    for share in shares(SPEC, LAYOUTS[layout]):
        net = Held(share)
        report = load_base(net, str(tmp_path / "base.safetensors"), share)
        assert not report.missing and not report.unexpected
        made = Adapter(tmp_path, None, {name: TENSORS[name] for name in adapter(SPEC)}, "", report.fingerprint)
        load_adapter(net, made, share, report.fingerprint)
        held = parts(TENSORS, share)
        assert net.values().keys() == held.keys()
        for name, value in net.values().items():
            np.testing.assert_array_equal(value, held[name], err_msg=name)
        prints |= report.fingerprint
        assert base_fingerprint(net, share).items() <= report.fingerprint.items()
        other = Adapter(tmp_path, None, {}, "", dict.fromkeys(report.fingerprint, "another"))
        with pytest.raises(UserError, match="trained on another base"):
            load_adapter(net, other, share, report.fingerprint)
    alone = Held(shares(SPEC, LAYOUTS["one"])[0])
    load_base(alone, str(tmp_path / "base.safetensors"))
    assert prints == base_fingerprint(alone)


def test_slices_without_manifests_need_their_strategy(tmp_path):
    """What MindFormers leaves of two ranks."""
    for share in shares(SPEC, LAYOUTS["tp2"]):
        (tmp_path / f"rank_{share.rank}").mkdir()
        held = {name: array for name, array in parts(TENSORS, share).items() if name in BASE}
        write(tmp_path / f"rank_{share.rank}" / "mf.ckpt", held)
        share.save_strategy(tmp_path, {name: array.shape for name, array in held.items()})
    share = shares(SPEC, LAYOUTS["tp4"])[1]
    with pytest.raises(UserError, match="--src_strategy_path_or_dir"):
        load_base(Held(share), str(tmp_path), share)
    net = Held(share)
    load_base(net, str(tmp_path), share, str(tmp_path / "strategy"))
    for name, array in parts(BASE, share).items():
        np.testing.assert_array_equal(net.values()[name], array, err_msg=name)


def test_each_piece_of_a_rank_takes_its_own():
    """Interleaved stages: a rank has several networks."""
    share = shares(SPEC, LAYOUTS["tp2_pp2"])[3]
    made = Adapter(Path("a"), None, {name: TENSORS[name] for name in adapter(SPEC)})
    net = Held(share, only="model.layers.3.")
    load_adapter(net, made, share)
    held = parts(TENSORS, share)
    loaded = {name: value for name, value in net.values().items() if "mindpet_delta" in name}
    assert len(loaded) == 6
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, held[name], err_msg=name)


def test_another_model_is_refused_by_its_whole_shapes():
    share = shares(SPEC, LAYOUTS["tp2"])[0]
    name = "model.layers.0.attention.wq.weight"
    tensors = BASE | {name: parts(TENSORS, share)[name]}  # the shape that the rank's own parameter has
    with pytest.raises(UserError, match=r"wq.weight is \[8, 16\] in the file and \[16, 16\] in the model"):
        load_into(Held(share), tensors, share=share)
