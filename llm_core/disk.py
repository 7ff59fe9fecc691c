"""What every part that keeps files on a disk needs: durability, and the hash of a whole file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BLOCK = 1 << 22


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder (creations, renames), durable. OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hash of a whole file, in hexadecimal. OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
