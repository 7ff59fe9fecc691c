"""The packaged runs have the ranks that they name, and layouts that these would accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_core.config import load_config
from llm_core.models.spec import spec_from_config
from llm_core.parallel.cuts import cut_parameters
from llm_core.parallel.layout import layout_from_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = [path for family in ("llama2", "falcon", "internlm") for path in sorted((CONFIGS / family).glob("*.yaml"))]
DATA = [(f"{kind}_dataset.data_loader.dataset_dir", "records.mindrecord") for kind in ("train", "eval")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_ranks_accept_the_layout(path, monkeypatch):
    loaded = load_config(path, [*DATA, ("predict_data", "a")])
    layout = layout_from_config(loaded.config)
    monkeypatch.setenv("MS_WORKER_NUM", str(layout.world))
    loaded.require_runnable()
    cut_parameters(spec_from_config(loaded.config.model), layout)
    comment = path.read_text("utf-8").partition("\nbase_config")[0]
    said = re.search(rf'\b{layout.world} (devices|ranks)\b|" {layout.world}$', comment, re.MULTILINE)
    assert said or layout.world == 1


def test_some_have_many():
    assert {layout_from_config(load_config(path).config).world for path in RUNS} >= {1, 8, 32, 64}
