"""What the planner prints."""

from __future__ import annotations

from collections.abc import Mapping

from llm_core.plan import memory, speed, traffic
from llm_core.plan.devices import GIB
from llm_core.plan.memory import MIB, micro_batches, ranks_of
from llm_core.plan.search import Estimate
from llm_core.report.table import table_lines

SHOWN_STAGES = 8  # of a longer pipeline the first, the fullest and the last
SHOWN_LAYOUTS = 12


def parameter_lines(counts: Mapping[str, tuple[int, int]], summary: str) -> list[str]:
    """The table of the model's parts, and the line of every run's log that sums it up."""
    rows = {part: pair for part, pair in counts.items() if pair[0]}
    total = [sum(pair[i] for pair in rows.values()) for i in range(2)]
    lines = [f"{'':<14}{'parameters':>18}{'trainable':>18}"]
    lines += [_count_row(part, *pair) for part, pair in rows.items()]
    if "head" not in rows:
        lines.append("(the head is the embedding)")
    return [*lines, _count_row("total", *total), "", summary]


def _count_row(part: str, every: int, learning: int) -> str:
    return f"{part:<14}{every:>18,}{learning:>18,}"


def estimate_lines(found: Estimate, steps: int | None) -> list[str]:
    """One layout: step, memory, traffic, time."""
    job, layout = found.job, found.layout
    device = job.device
    peak = (device.narrow if job.narrow else device.wide) / 1e12
    room = f"{device.memory / GIB:.0f} GiB{' for all ranks' if device.is_cpu else ''}, {peak:.3g} TFLOP/s"
    window = micro_batches(job, layout)
    lines = [
        f"AN ESTIMATE, nothing was run: {layout.describe()} on {layout.world} x {device.name} ({room})",
        f"a step: {job.records:,} records of {job.length:,} tokens = {job.tokens:,} tokens, "
        f"in {window} micro-batch{'es' if window > 1 else ''} of {job.rows} on each data-parallel rank",
        "",
        *_memory_lines(found),
        "",
        _traffic_line(found),
        _time_line(found),
        f"{found.tokens_per_second:,.0f} tokens/s, {_speed(found)} a device; "
        f"{found.utilization:.0%} of the peak",
    ]
    if steps is not None:
        lines.append(f"the run: {steps:,} steps, {_duration(steps * found.time.total)}")
    else:
        lines.append("the run: how many steps it has, the records say; give --train_dataset_dir")
    return lines


def _memory_lines(found: Estimate) -> list[str]:
    rows = []
    unit, word = (MIB, "MiB") if found.fullest.total < 4 * GIB else (GIB, "GiB")
    for stage in _shown_stages(found):
        ranks, layers = ranks_of(found.layout, stage), found.layers[stage]
        name = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        part = found.memory[stage]
        rows.append([name, len(layers), *(_size(value, unit) for value in (*part, part.total))])
    left = len(found.layers) - len(rows)
    verdict = "it fits" if found.fits else "IT DOES NOT FIT"
    return [
        f"memory of a rank, {word}",
        *table_lines(["ranks", "layers", *memory.PARTS, "together"], rows),
        *([f"({left} more stages of no more)"] if left else []),
        f"the fullest rank needs {_size(found.fullest.total, unit)} of {_size(found.room, unit)} {word}: {verdict}",
    ]


def _shown_stages(found: Estimate) -> list[int]:
    stages = sorted(found.memory)
    if len(stages) <= SHOWN_STAGES:
        return stages
    fullest = max(stages, key=lambda stage: found.memory[stage].total)
    return sorted({stages[0], fullest, stages[-1]})


def _traffic_line(found: Estimate) -> str:
    if found.layout.world == 1:
        return "sent by a rank a step: nothing"
    most = max(found.traffic.values(), key=sum)
    parts = [f"{kind} {_bytes(value)}" for kind, value in zip(traffic.KINDS, most, strict=True) if value]
    return f"sent by a rank a step: {', '.join(parts) or 'nothing'}"


def _time_line(found: Estimate) -> str:
    parts = [f"{kind} {value:.3g}" for kind, value in zip(speed.KINDS, found.time, strict=True) if value >= 5e-4]
    return f"time of a step: {found.time.total:.3g} s ({', '.join(parts)})"


def change_lines(now: Estimate, changes: list[tuple[str, Estimate]]) -> list[str]:
    """What makes it fit, with memory and time."""
    if not changes:
        return ["no change that was tried makes it fit: take more devices, a shorter seq_length or a smaller model"]
    rows = []
    for text, each in changes:
        layout, size = each.layout, _size(each.fullest.total)
        rows.append([text, layout.describe(), layout.world, size, f"{each.time.total:.3g}", _speed(each)])
    header = ["change", "layout", "devices", "GiB", "s a step", "tokens/s/device"]
    return ["what makes it fit, cheapest first:", *table_lines(header, rows, left=2)]


def layout_lines(devices: int, found: list[Estimate]) -> list[str]:
    """The table of layouts on so many devices."""
    if not found[0].fits:
        least = found[0]
        return [
            f"no layout fits on {devices}: the least is {_size(least.fullest.total)} GiB of {_size(least.room)}, "
            f"{least.layout.describe()}"
        ]
    rows = [_layout_row(each) for each in found[:SHOWN_LAYOUTS]]
    header = ["dp", "tp", "pp", "ZeRO", "rows", "micro-batches", "GiB", "s a step", "tokens/s/device", "of peak"]
    more = len(found) - len(rows)
    return [
        f"layouts of {devices} that fit, fastest first (an estimate, ZeRO and rows chosen for each):",
        *table_lines(header, rows, left=0),
        *([f"({more} more)"] if more > 0 else []),
    ]


def _layout_row(each: Estimate) -> list[object]:
    layout = each.layout
    return [
        layout.dp, layout.tp, layout.pp, layout.zero, each.job.rows, micro_batches(each.job, layout),
        _size(each.fullest.total), f"{each.time.total:.3g}", _speed(each), f"{each.utilization:.0%}",
    ]  # fmt: skip


def _speed(found: Estimate) -> str:
    """Tokens a second and device."""
    return f"{found.tokens_per_second / found.layout.world:,.0f}"


def _size(value: float, unit: int = GIB) -> str:
    return f"{value / unit:.2f}" if value < 100 * unit else f"{value / unit:,.0f}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
