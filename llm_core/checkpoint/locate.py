"""From what the user gave as `load_checkpoint` to the weight files that it means."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llm_core.checkpoint.files import WRITABLE, is_weight_file
from llm_core.errors import UserError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_PEFT_CONFIG, _PEFT_STEM = "adapter_config.json", "adapter_model"  # of a folder that Hugging Face's PEFT has saved
_RUN_FILE = re.compile(r"(?P<stem>.+)-(?P<epoch>\d+)_(?P<step>\d+)")


def weight_files(path: str | Path) -> list[Path]:
    """The files that `path` stands for, all to be merged.

    path: a weight file; a Hugging Face folder (sharded or not); Meta's folder (params.json, consolidated.*.pth); a
    run's output_dir; a folder that holds rank_0; a folder of weight files (of a run's files `NAME-{epoch}_{step}`
    the last by meta.json, else the highest, for each NAME). UserError when there is nothing.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"load_checkpoint: {path}: no such file or folder")
    for inner in (path / "checkpoint" / "rank_0", path / "rank_0"):
        if inner.is_dir():
            return _in_folder(inner)
    return _in_folder(path)


def rank_files(path: str | Path) -> list[Path]:
    """The weight file of every rank, rank 0's first, of a folder that holds rank_0, rank_1 ... (or of an output_dir).

    UserError where a rank has none, or several that belong to different runs.
    """
    path = Path(path).expanduser()
    folder = next((inner for inner in (path / "checkpoint", path, path.parent) if (inner / "rank_0").is_dir()), None)
    if folder is None:
        raise UserError(f"load_checkpoint: {path}: no folder of ranks: there is no rank_0 in it")
    files = []
    while (own := folder / f"rank_{len(files)}").is_dir():
        found = _in_folder(own)
        if len(found) > 1:
            raise UserError(f"load_checkpoint: {own}: {len(found)} files, {found[0].name} and others; leave one there")
        files += found
    return files


def _in_folder(folder: Path) -> list[Path]:
    for index in _INDEXES:
        if (folder / index).is_file():
            return _of_index(folder / index)
    for single in _SINGLES:
        if (folder / single).is_file():
            return [folder / single]
    meta = _last_of_run(folder)
    if meta is not None:
        return [meta]
    files = _own_weights(folder)
    if not files and (folder / _PEFT_CONFIG).is_file():
        raise UserError(
            f"load_checkpoint: {folder}: an adapter of PEFT without its base: give it as --adapter_id {folder}, and "
            "the base as load_checkpoint"
        )
    if not files:
        raise UserError(
            f"load_checkpoint: {folder}: no weights in this folder (.safetensors, .ckpt, .bin or .pth, "
            "a rank_0 folder or checkpoint/rank_0)"
        )
    return _newest_of_each_run(files)


def _own_weights(folder: Path) -> list[Path]:
    """The weight files in a folder that are no PEFT adapter's."""
    peft = (folder / _PEFT_CONFIG).is_file()
    files = (file for file in folder.iterdir() if file.is_file() and is_weight_file(file))
    return sorted(file for file in files if not (peft and file.stem == _PEFT_STEM))


def passed_over(path: str | Path) -> list[Path]:
    """The files that may hold an adapter in a folder of which `weight_files` takes those of a standard name alone."""
    path = Path(path).expanduser()
    taken = weight_files(path)
    folder = taken[0].parent
    if path.is_file() or not any((folder / name).is_file() for name in (*_INDEXES, *_SINGLES)):
        return []
    return _newest_of_each_run([file for file in _own_weights(folder) if file not in taken and file.suffix in WRITABLE])


def _of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: damaged: no weight_map in it ({error})") from error
    files = []
    for name in names:
        file = index.parent / str(name)
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{index}: names {name}, which is not in {index.parent}; fetch the missing shard")
        files.append(file)
    return files


def _last_of_run(folder: Path) -> Path | None:
    """The file that meta.json points to."""
    try:
        name = json.loads((folder / "meta.json").read_text())["last_ckpt_file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    file = folder / Path(str(name)).name
    if not file.is_file():
        raise UserError(f"{folder / 'meta.json'}: names {name}, which is gone; give the file to load itself")
    return file


def _newest_of_each_run(files: list[Path]) -> list[Path]:
    newest: dict[str, tuple[tuple[int, int], Path]] = {}
    for file in files:
        match = _RUN_FILE.fullmatch(file.stem)
        if match:
            age = (int(match["epoch"]), int(match["step"]))
            newest[match["stem"]] = max(newest.get(match["stem"], (age, file)), (age, file))
        else:
            newest[file.name] = ((0, 0), file)
    return [file for _, file in newest.values()]
