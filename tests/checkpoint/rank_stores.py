"""The stores of several ranks in one process: a thread each, which meet as the ranks of a run do."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

from layout_samples import SPECS, parts, shares

from llm_core.checkpoint.store import CheckpointStore
from llm_core.parallel.gate import Gate, GateServer


def stores(folder, layout, spec=SPECS["llama"], prefix="m", **settings):
    """Of all ranks of `layout`."""
    server = GateServer("127.0.0.1", layout.world)
    return [_store(folder, share, server, prefix, settings) for share in shares(spec, layout)]


def _store(folder, share, server, prefix, settings):
    gate = Gate("127.0.0.1", server.port, server.token, share.rank)
    count = itertools.count()
    store = CheckpointStore(
        folder, prefix, share.rank, share.layout.world, lambda value: gate.meet(str(next(count)), value), **settings
    )
    store.share = share
    return store


def on_all(every, work):
    """What `work(store)` returns on every rank, at the same time."""
    with ThreadPoolExecutor(len(every)) as pool:
        return [future.result() for future in [pool.submit(work, store) for store in every]]


def save_all(every, step, tensors, state=None, **more):
    """A save of every rank's part of `tensors`; returns the checkpoint's path."""
    state = state or {"step": step}
    paths = on_all(every, lambda s: s.save(1, step, parts(tensors, s.share), state, **more))
    assert len(set(paths)) == 1
    return paths[0]
