"""Start-up of MindSpore: what must be set before its import, what after, and what a second start may reuse."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
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
        threads: OpenMP threads of this process; None: its share of the cores, see `threads_of_this_process`.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GLOG_v", "3")
    # A failed compile dumps its graph; by default into ./rank_0 of whatever folder the user stands in.
    os.environ.setdefault("MS_OM_PATH", str(cache_dir() / "failed_compile"))
    # The sub-processes of MindSpore's data pipeline would each warn about fork and tokenizers' threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = threads or threads_of_this_process()
    # What OpenMP does by itself stays unsaid: a child process would take it for the user's wish.
    if threads != _allowed_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def threads_of_this_process() -> int:
    """Threads that let this process and its fellows on the machine share the cores without getting in each other's way.

    The group's size on this machine is $LOCAL_WORLD_SIZE; msrun tells its workers only the size of the whole group
    ($MS_WORKER_NUM, $RANK_SIZE), the most that this machine can have of it. Cores that msrun has bound to this
    process alone ($MSRUN_CPU_LIST) are not shared.
    """
    if "MSRUN_CPU_LIST" in os.environ:
        return usable_cores()
    sizes = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "MS_WORKER_NUM", "RANK_SIZE"))
    group = next((int(size) for size in sizes if size.isdecimal() and int(size) > 0), 1)
    return max(usable_cores() // group, 1)


def usable_cores() -> int:
    """Cores that this process may use: by its affinity, and by the CPU quota of its container."""
    return max(min(_allowed_cores(), _quota()), 1)


def _allowed_cores() -> int:
    """By affinity alone, as OpenMP counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that the control group's CPU quota comes to, rounded up; very many where there is none.

    Read of version 2 (cpu.max) and version 1 (cpu.cfs_*), as a container sees its own group.
    """
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((root / name).read_text(encoding="ascii") for name in names).split()
            if int(period) > 0 and int(quota) > 0:  # "max" and -1 mean none
                return -(-int(quota) // int(period))
        except (OSError, ValueError):
            continue
    return sys.maxsize


def start(config: Any) -> None:
    """Import MindSpore and set it up for a run: GRAPH_MODE, device, seed, and on Ascend the YAML's context.

    Args:
        config: a `RunConfig`; read are `seed`, `context` and, on Ascend, `env` and `use_parallel`.
    """
    prepare_environment()
    if config.context.device_target == "Ascend":  # not verified here: there is no such device
        os.environ.update({name: str(value) for name, value in (config.env or {}).items()})
    import mindspore as ms

    context = config.context
    # Every parameter's update nests two calls deeper: MindSpore's default of 1000 ends at some 30 layers.
    ms.set_context(mode=context.mode, device_target=context.device_target, max_call_depth=context.max_call_depth)
    ms.set_seed(max(int(config.seed), 0))
    if config.context.device_target == "Ascend":  # not verified here
        own = os.environ.get("DEVICE_ID", "") if config.use_parallel else ""  # the launcher's, of each rank
        device = int(own) if own.isdecimal() else config.context.device_id
        ms.set_context(device_id=device, **_ascend_context(config.context))


def _ascend_context(context: Any) -> dict[str, Any]:
    """The `context` keys of the YAML that `mindspore.set_context` takes as they are."""
    names = (
        "max_device_memory", "mempool_block_size", "save_graphs", "save_graphs_path",
        "enable_graph_kernel", "jit_config", "memory_optimize_level", "ascend_config", "deterministic",
        "runtime_num_threads", "infer_boost",
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
    files: two runs that differ in a constant or a shape would silently share a graph. So every graph is kept
    in a folder of its own, named by a hash of `key`, of this package's sources and of MindSpore's version,
    and handed to MindSpore under the number that it will look for.
    Compile exactly one cell inside the block (its first call). All parameters that the graph touches must be
    found by the cell's `parameters_dict()`: that is where MindSpore looks up the weights of a cached graph.
    RUN_LLM_COMPILE_CACHE=0 turns the cache off.

    Args:
        key: everything that shapes the graph: what is compiled, the model's spec, input shapes, constants.
    """
    work = None if os.environ.get("RUN_LLM_COMPILE_CACHE") == "0" else _work_folder()
    if work is None:
        yield
        return
    import mindspore as ms

    key = {**_every_graph, **key, "version": ms.__version__, "sources": _source_hash()}
    text = json.dumps(key, sort_keys=True, default=str)
    kept = cache_dir() / "graphs" / hashlib.sha256(text.encode()).hexdigest()[:32]
    graphs = work / f"rank_{os.environ.get('RANK_ID', '0')}" / "graph_cache"
    placed = _place(kept, graphs)
    _forget_entry_script()
    ms.set_context(enable_compile_cache=True, compile_cache_path=str(work))
    try:
        yield
    finally:
        ms.set_context(enable_compile_cache=False)
    _collect(graphs, placed, kept)


def add_to_graph_keys(name: str, value: Any) -> None:
    """Name what every graph of this process depends on (the operators' library): part of each graph's key from now."""
    _every_graph[name] = value


_every_graph: dict[str, Any] = {}
_graphs_so_far = 0  # that MindSpore has compiled, or found, with its cache on: the number of the next one


@cache
def _work_folder() -> Path | None:
    """This process's own folder for MindSpore's cache, which keeps to the first path it is given.

    None where nothing can be written (a read-only home): then graphs are compiled without a cache.
    """
    root = cache_dir() / "graphs"
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="work-", dir=root))
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _place(kept: Path, graphs: Path) -> set[str]:
    """Put the kept graphs where MindSpore will look for its next ones; returns their file names there."""
    names = set()
    try:
        for number, path in enumerate(sorted(kept.glob("*.mindir")), start=_graphs_so_far):
            graphs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, graphs / f"compile_cache_{number}.mindir")
            names.add(f"compile_cache_{number}.mindir")
        if names:
            shutil.copyfile(kept / "compile_dependency.hash", graphs / "compile_dependency.hash")
            os.utime(kept)
    except OSError:  # another process is pruning: then it is compiled
        return set()
    return names


def _collect(graphs: Path, placed: set[str], kept: Path) -> None:
    """Keep what has been compiled, under its final name only when it is whole, and clear the work folder."""
    global _graphs_so_far
    found = {path.name: int(path.stem.rpartition("_")[2]) for path in graphs.glob("*.mindir")}
    _graphs_so_far = max([_graphs_so_far, *(number + 1 for number in found.values())])
    try:
        if found.keys() - placed:
            new = Path(tempfile.mkdtemp(prefix="new-", dir=kept.parent))
            for name, number in found.items():
                shutil.copyfile(graphs / name, new / f"{number:06d}.mindir")
            shutil.copyfile(graphs / "compile_dependency.hash", new / "compile_dependency.hash")
            shutil.rmtree(kept, ignore_errors=True)
            new.rename(kept)
        _prune(kept.parent)
    except OSError:  # a full disk, or another process was first
        pass
    for name in found:
        (graphs / name).unlink(missing_ok=True)


def _prune(root: Path) -> None:
    """Remove the least recently used graphs, and what processes that were killed have left."""
    newest_first = sorted(root.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in newest_first[_KEPT_GRAPHS:]:
        shutil.rmtree(entry, ignore_errors=True)


def _forget_entry_script() -> None:
    """Keep MindSpore from reading the started script and all it imports, to compare their hashes.

    Our key covers the sources, and under `python -c` or a test runner that script is no file to be read.
    """
    for name in ("mindspore.graph.api", "mindspore.common.api"):  # 2.10, 2.9
        module = sys.modules.get(name)
        if getattr(module, "entry_script_path", None) is not None:
            module.entry_script_path = None


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
        if self.prepare(*args):
            _compiled_by_all()
        return self.cell(*args)

    def prepare(self, *args: Any) -> bool:
        """Compile for these arguments' shapes, unless that has been done; whether it had to be."""
        shapes = str([(tuple(arg.shape), str(arg.dtype)) for arg in args])
        if shapes in self._seen:
            return False
        with compile_cache(cell=type(self.cell).__name__, shapes=shapes, training=self.cell.training, **self.key):
            self.cell.compile(*args)
        _return_free_memory()
        self._seen.add(shapes)
        return True


def after_compiling(meet: Callable[[], Any]) -> None:
    """Call `meet` whenever a graph has been compiled, before it runs: where all ranks compile the same ones, to wait
    for each other, since they are not equally quick at it."""
    global _compiled_by_all
    _compiled_by_all = meet


def _compiled_by_all() -> None:
    """One process waits for nobody."""


def _return_free_memory() -> None:
    """Give what compiling has freed back to the system before the graph's own buffers come on top of it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
