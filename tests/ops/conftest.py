"""The backends and execution modes that every operator is tested in."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(params=[("reference", "graph"), ("cpu", "graph"), ("cpu", "pynative")], ids="-".join)
def core_ops(request: pytest.FixtureRequest):
    """The operators of one backend, in GRAPH_MODE or PyNative."""
    import mindspore as ms

    from llm_core import ops

    name, mode = request.param
    if name == "cpu" and ops.backend().name != "cpu":
        pytest.skip(ops.backend().reason)
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    yield importlib.import_module(f"llm_core.ops.{name}")
    ms.set_context(mode=ms.GRAPH_MODE)
