"""The manifest of a data set: `<file>.manifest.json` beside a MindRecord, with counts, sizes and hashes.

    {"format": "run_llm-records/1", "records": n, "columns": {name: width},
     "files": {name: {"bytes": n, "sha256": hex}},
     "tokenizer": {"path": file, "sha256": hex}, ... and what else the preprocessing knows}

While files are being replaced it says `"incomplete": true` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_core.disk import fsync
from llm_core.errors import UserError

SUFFIX = ".manifest.json"
FORMAT = "run_llm-records/1"


def read_manifest(path: Path) -> dict[str, Any]:
    """Content of a manifest file, {} if there is none. UserError: unreadable or another program's."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable manifest ({error}). Write the data set again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of this program ({FORMAT}). Remove or rename it.")
    return manifest


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write value as UTF-8 JSON, durably. OSError."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(path)
