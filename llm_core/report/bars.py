"""A picture of shares as horizontal bars: one group of bars after the other, each under a heading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llm_core.report.plot import save_figure, style

BAR, MEAN, CHANCE = "#1f5fa8", "#d1495b", "#666666"
_ROW = 0.24  # inches
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind figures that a line would cross


def draw_shares(
    groups: Mapping[str, Mapping[str, float]], path: Path, *, title: str, mean: float, chance: float
) -> Path:
    """Draw shares (0 to 1) by group and name to `path` (PNG), with lines at `mean` and at `chance`; returns it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sum(len(group) + 1 for group in groups.values())
    figure = Figure(figsize=(8, max(2.5, 1.4 + _ROW * rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places, labels, heads, row = [], [], [], 0.0
    for heading, shares in groups.items():
        places.append(row)
        labels.append(heading)
        heads.append(len(labels) - 1)
        for name, share in shares.items():
            row += 1
            axes.barh(row, share, height=0.72, color=BAR)
            axes.text(share + 0.008, row, f"{share:.1%}", va="center", fontsize=7.5, bbox=_WHITE)
            places.append(row)
            labels.append(name.replace("_", " "))
        row += 1.4
    axes.set_yticks(places, labels, fontsize=8)
    for number in heads:
        axes.get_yticklabels()[number].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.axvline(mean, color=MEAN, linewidth=1.4, label=f"mean {mean:.1%}")
    axes.axvline(chance, color=CHANCE, linewidth=1.2, linestyle="--", label=f"chance {chance:.1%}")
    axes.set_ylim(row, -1)
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("right answers")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.set_title(title)
    style(axes)
    axes.grid(False, axis="y")
    return save_figure(figure, path)
