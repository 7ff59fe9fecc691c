"""The lock of an output folder where the file system has none."""

from __future__ import annotations

import errno
import os

from llm_core.checkpoint import lock


def test_a_folder_without_locks_is_used_and_told_of(tmp_path, monkeypatch, capsys):
    def flock(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with lock.lock_output_dir(tmp_path) as folder:
        assert folder == tmp_path and str(os.getpid()) in (tmp_path / ".run.lock").read_text()
    told = capsys.readouterr().err
    assert f"{tmp_path}/.run.lock cannot be locked (No locks available)" in told
