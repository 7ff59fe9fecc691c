"""Start-up of MindSpore: what must be set before its import, what after, and what a second start may reuse."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# Compiled graphs kept per user; the least recently used beyond this many are removed.
_KEPT_GRAPHS = 64


def prepare_environment(threads: int | None = None) -> None:
    """Set the process environment that MindSpore and OpenMP read once, at import.

    `passive` waiting matters: MindSpore's own thread pool and OpenMP regions share the cores, and spinning
    OpenMP threads take them away from MindSpore (a train step is 1.6x slower). Values that the user has set
    are left alone. Must run before the first `import mindspore`; later calls change nothing.

    Args:
        threads: OpenMP threads of this process; None leaves the choice to OpenMP (all cores it may use).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GLOG_v", "3")
    # A failed compile dumps its graph; by default into ./rank_0 of whatever folder the user stands in.
    os.environ.setdefault("MS_OM_PATH", str(cache_dir() / "failed_compile"))
    # The sub-processes of MindSpore's data pipeline would each warn about fork and tokenizers' threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def start(config: Any) -> None:
    """Import MindSpore and set it up for a run: GRAPH_MODE, device, seed, and on Ascend the YAML's context.

    Args:
        config: a `RunConfig`; read are `seed`, `context` and, on Ascend, `env`.
    """
    prepare_environment()
    if config.context.device_target == "Ascend":  # not verified here: there is no such device
        os.environ.update({name: str(value) for name, value in (config.env or {}).items()})
    import mindspore as ms

    ms.set_context(mode=config.context.mode, device_target=config.context.device_target)
    ms.set_seed(max(int(config.seed), 0))
    if config.context.device_target == "Ascend":  # not verified here
        ms.set_context(device_id=config.context.device_id, **_ascend_context(config.context))


def _ascend_context(context: Any) -> dict[str, Any]:
    """The `context` keys of the YAML that `mindspore.set_context` takes as they are."""
    names = (
        "max_call_depth", "max_device_memory", "mempool_block_size", "save_graphs", "save_graphs_path",
        "enable_graph_kernel", "jit_config", "memory_optimize_level", "ascend_config", "deterministic",
        "runtime_num_threads",
    )
    values = {name: getattr(context, name, None) for name in names}
    dumped = {name: value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
              for name, value in values.items()}
    return {name: value for name, value in dumped.items() if value is not None}


def cache_dir() -> Path:
    """The per-user cache: $RUN_LLM_CACHE, else $XDG_CACHE_HOME/run_llm, else ~/.cache/run_llm."""
    if "RUN_LLM_CACHE" in os.environ:
        return Path(os.environ["RUN_LLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "run_llm"


@contextmanager
def compile_cache(**key: Any) -> Iterator[None]:
    """Within this block, take compiled graphs from the per-user cache, or put them there.

    MindSpore's own cache names a graph by nothing but its order in the process and checks only the source
    files: two runs that differ in a constant or a shape would silently share a graph. So every graph gets a
    folder of its own, named by a hash of `key`, of this package's sources and of MindSpore's version.
    Compile exactly one cell inside the block (its first call). RUN_LLM_COMPILE_CACHE=0 turns the cache off.

    Args:
        key: everything that shapes the graph: what is compiled, the model's spec, input shapes, constants.
    """
    if os.environ.get("RUN_LLM_COMPILE_CACHE") == "0":
        yield
        return
    import mindspore as ms

    text = json.dumps({**key, "version": ms.__version__, "sources": _source_hash()}, sort_keys=True, default=str)
    root = cache_dir() / "graphs"
    final = root / hashlib.sha256(text.encode()).hexdigest()[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        # A new graph is compiled into a folder of its own and renamed when whole, so that a killed process
        # or a second one at the same moment never leaves half a graph under the final name.
        work = final if final.exists() else Path(tempfile.mkdtemp(prefix="new-", dir=root))
    except OSError:  # a read-only home: compile without a cache
        yield
        return
    _forget_entry_script()
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(work))
    try:
        yield
    except BaseException:
        if work != final:
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        ms.set_context(enable_compile_cache=False)
    _keep(work, final)


def _forget_entry_script() -> None:
    """Keep MindSpore from reading the started script and all it imports, to compare their hashes.

    Our key covers the sources, and under `python -c` or a test runner that script is no file to be read.
    """
    for name in ("mindspore.graph.api", "mindspore.common.api"):  # 2.10, 2.9
        module = sys.modules.get(name)
        if getattr(module, "entry_script_path", None) is not None:
            module.entry_script_path = None


def _keep(work: Path, final: Path) -> None:
    """Give a new graph its name, mark an old one as used, and drop the least recently used ones."""
    try:
        if work != final:
            work.rename(final)
        os.utime(final)
        kept = sorted(final.parent.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    except OSError:  # another process was first, or is pruning: its folder serves as well as ours
        shutil.rmtree(work, ignore_errors=True)
        return
    for entry in kept[_KEPT_GRAPHS:]:
        shutil.rmtree(entry, ignore_errors=True)


@cache
def _source_hash() -> str:
    """A hash of every Python source of this package: an edited layer must not meet yesterday's graph."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Compiled:
    """A Cell whose first call at each set of argument shapes goes through `compile_cache`.

    Args:
        cell: the Cell to call.
        key: everything beside the argument shapes that shapes its graph; see `compile_cache`.
    """

    def __init__(self, cell: Any, **key: Any) -> None:
        self.cell = cell
        self.key = key
        self._seen: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        """The cell's own result."""
        shapes = str([(tuple(arg.shape), str(arg.dtype)) for arg in args])
        if shapes in self._seen:
            return self.cell(*args)
        with compile_cache(cell=type(self.cell).__name__, shapes=shapes, training=self.cell.training, **self.key):
            result = self.cell(*args)
        self._seen.add(shapes)
        return result
