"""A run goes on from what several ranks have saved (here: threads that share a one-process run's tensors out)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from llm_core.config import load_config
from llm_core.models.spec import spec_from_config
from llm_core.parallel.layout import Layout
from llm_core.train.loop import fit
from llm_core.train.resume import store_of
from llm_core.train.run import build

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

from rank_stores import save_all, stores  # noqa: E402


def test_one_process_goes_on_from_several_ranks(write_config, tmp_path):
    whole = build(load_config(write_config()))
    assert fit(whole) == 0
    expected = {name: value.copy() for name, value in whole.snapshot().items()}
    one = store_of(load_config(write_config()).config)
    tensors, state, _, _ = one.read(one.folder / "tiny_rank_0-1_8.safetensors")
    spec = spec_from_config(load_config(write_config()).config.model)
    for name, layout in (("a", Layout(dp=2, tp=2, zero=3, zero_threshold=0)), ("b", Layout(tp=4))):
        path = save_all(stores(tmp_path / name, layout, spec, "tiny"), 8, tensors, state)
        config = write_config(output_dir=str(tmp_path / name))
        resumed = build(load_config(config, [("resume_training", "True")]))
        assert (resumed.cursor.step, resumed.newest) == (8, path)
        assert fit(resumed) == 0
        for key, value in resumed.snapshot().items():
            assert np.array_equal(value, expected[key]), key
        assert not list((tmp_path / name / "checkpoint" / "rank_3").glob("*-1_9.*"))
        last = store_of(load_config(config).config).latest()  # of one process again, among those of four ranks
        assert last.name == "tiny_rank_0-1_21.safetensors"
