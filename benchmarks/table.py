#!/usr/bin/env python3
"""Make the benchmark tables of README.md and README_zh.md from benchmarks/results/*.json, with the picture there.

    python benchmarks/table.py            # rewrites what lies between the two markers in both files
    python benchmarks/table.py --check    # rc 1 if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
TEXTS = {
    "README.md": (
        ("figure", "ratio", "run_llm", "peer", "measured"),
        "No result is committed yet; `make bench` measures them.",
    ),
    "README_zh.md": (
        ("项目", "比值", "run_llm", "对照", "测量环境"),
        "还没有提交的结果；`make bench` 会测量。",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, (titles, empty) in TEXTS.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = with_table(old, (table(titles) or empty) + picture())
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"{', '.join(stale)}: the table is not that of benchmarks/results; run benchmarks/table.py")
    return bool(check and stale)


def with_table(text: str, rows: str) -> str:
    """`text` with what lies between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def table(titles: tuple[str, ...]) -> str:
    """A Markdown table, a row a figure; empty when there is no result."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        where = f"{result['machine']['cpu']}, {result['settings']['threads']} threads, {result['commit'][:8]}"
        for r in result["ratios"]:
            own, peer = (f"{r[key]:.4g} {r['unit']}" for key in ("own", "peer_value"))
            rows.append(f"| {r['name']} | {r['ratio']:.2f} | {own} | {r['peer']}: {peer} | {where} |")
    if not rows:
        return ""
    return "\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows])


def picture() -> str:
    """The picture that benchmarks/attention.py draws, below the table; empty when there is none."""
    path = RESULTS / "attention.png"
    return f"\n\n![attention]({path.relative_to(ROOT)})" if path.exists() else ""


if __name__ == "__main__":
    raise SystemExit(main())
