"""`FILE.manifest.json` beside a saved file: its size and sha256, and what the run needs to go on from it.

The manifest is written before the file gets its name, so a file under a final name always has one. When a file
is replaced by a new one of the same name, the manifest lists both versions until the replacement is done: at
whatever moment the process dies, the file matches one of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llm_core.checkpoint.staged import StagedFile, write_json
from llm_core.disk import sha256
from llm_core.errors import UserError

MANIFEST_SUFFIX = ".manifest.json"


@dataclass(frozen=True)
class Version:
    """One content of a file. `serial` counts the saves of a run; `saved_at` is in seconds since 1970."""

    sha256: str
    size: int
    epoch: int = 0
    step: int = 0
    serial: int = 0
    saved_at: float = 0.0
    metric: float | None = None
    state: dict = field(default_factory=dict)


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + MANIFEST_SUFFIX)


def read_manifest(path: Path) -> list[Version]:
    """The versions that the manifest of `path` allows, newest first; [] when there is no (readable) manifest."""
    try:
        content = json.loads(manifest_path(path).read_text())
        versions = [Version(**version) for version in content["versions"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    whole = all(isinstance(n, int) for v in versions for n in (v.size, v.epoch, v.step, v.serial))
    return versions if whole and all(isinstance(v.state, dict) for v in versions) else []


def write_manifest(path: Path, versions: list[Version]) -> None:
    content = {"file": path.name, "versions": [asdict(version) for version in versions]}
    write_json(manifest_path(path), content, sync=False)


def commit_with_manifest(staged: StagedFile, version: Version) -> None:
    """Give the finished `staged` file its name, with its manifest, so that no moment leaves one without the other."""
    old = read_manifest(staged.target)[:1] if staged.target.exists() else []
    write_manifest(staged.target, [version, *old])
    staged.commit()
    if old:
        write_manifest(staged.target, [version])


def verified_version(path: Path) -> Version | None:
    """The manifest's entry that the file's content matches; None for a file without a manifest.

    Raises UserError when the file is not what was saved.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    versions = read_manifest(path)
    if not versions:
        if manifest_path(path).exists():
            raise UserError(f"{manifest_path(path)}: damaged; delete it to load the file unverified")
        return None
    size = path.stat().st_size
    candidates = [version for version in versions if version.size == size]
    if not candidates:
        raise UserError(f"{path}: damaged: {size} bytes, {versions[0].size} were saved; use another checkpoint")
    digest = sha256(path)
    for version in candidates:
        if version.sha256 == digest:
            return version
    raise UserError(f"{path}: damaged: its content is not what was saved (sha256 differs); use another checkpoint")
