"""MindSpore in graph mode for the tests of adapters, whichever of them comes first in its process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def graph_mode():
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
