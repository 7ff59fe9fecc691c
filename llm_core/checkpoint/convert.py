"""Weights from one format into another: what tools/convert_weight.py does. A tensor at a time, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import BY_NAME, FLAG_NAMES, Head, check_fits
from llm_core.checkpoint.files import WRITABLE, file_size, write_tensors
from llm_core.checkpoint.hf import family_hint, is_parameter
from llm_core.checkpoint.hf_config import config_for, hf_config_metadata
from llm_core.checkpoint.hf_fused import HfView, QkvLayout
from llm_core.checkpoint.manifest import Version, commit_with_manifest
from llm_core.checkpoint.qkv import ConcatView, joined_of, parts_of
from llm_core.checkpoint.staged import NewFolder, StagedFile, write_json
from llm_core.checkpoint.state_names import is_state
from llm_core.checkpoint.weights import SelectedTensors, WeightFiles, open_weights
from llm_core.config.hf_folder import family_of, has_two_norms, hf_config_to_model_config, qkv_grouping
from llm_core.errors import UserError
from llm_core.report.console import console


def to_mindformers(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    qkv_concat: bool = False,
    family: str | None = None,
) -> Path:
    """Write the weights of `source` as one file under MindFormers' names, with a manifest, and return its path.

    source: anything `open_weights` takes. target: a .safetensors or .ckpt file; a folder gets FAMILY.safetensors.
    dtype: fp32, bf16, fp16 or None, as stored. qkv_concat: join wq, wk, wv and w1, w3. family: the model_type that a
    config.json beside the source must have, None = any. UserError for bad input.
    """
    target = Path(target)
    if not target.suffix or target.is_dir():
        target = target / f"{family or 'llama'}.safetensors"
    if target.suffix not in WRITABLE:
        raise UserError(f"--output_path: {target}: the name must end in {' or '.join(WRITABLE)}")
    weights = open_weights(source)
    try:
        weights.verify()
        view = _projections(_model_weights(weights, source), joined=qkv_concat)
        heads = {name: _as_type(head, dtype) for name, head in view.heads.items()}
        metadata = {"format": "ms", **hf_config_metadata(source, weights, family)}
        with StagedFile(target, file_size(target.suffix, heads, metadata)) as staged:
            write_tensors(staged, heads, _reader(view, heads, len(heads)), metadata)
            commit_with_manifest(staged, Version(staged.sha256, staged.size))
    finally:
        weights.close()
    return target


def to_hugging_face(
    source: str | Path,
    target: str | Path,
    dtype: str | None = None,
    config: str | Path | None = None,
    max_shard_size: int = 5 * 10**9,
    family: str | None = None,
) -> Path:
    """Write the weights of `source` (MindFormers' names) as a Hugging Face folder and return it.

    target: a folder that is new or empty; it appears when all of it is written. config: a YAML of ours or
    MindFormers', or a config.json; None where `source` is a .safetensors that was converted from a folder with one.
    max_shard_size: bytes of a file's tensors. family: the model_type to write, None = the one that the configuration is
    named for. UserError for bad input.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output_path: {target}: must be a new or empty folder")
    weights = open_weights(source)
    try:
        weights.verify()
        view = _projections(_model_weights(weights, source), joined=False)
        hf_config = config_for(view, source, config, weights.metadata, family, dtype)
        theirs = _named_as(hf_config, view)
        heads = {name: _as_type(head, dtype) for name, head in theirs.heads.items()}
        with NewFolder(target, sum(head.nbytes for head in heads.values())) as folder:
            _write_shards(folder, theirs, heads, max_shard_size)
            write_json(folder / "config.json", hf_config)
            for name, content in weights.companions().items():
                _write_companion(folder / name, content)
            folder.commit()
    finally:
        weights.close()
    return target


# ---- names, types, projections


def _model_weights(weights: WeightFiles, source: str | Path) -> SelectedTensors:
    """The model's own tensors; optimizer state is left out, with one line; a foreign name is refused."""
    state = [name for name in weights if is_state(name, weights)]
    kept = [name for name in weights if not is_state(name, weights)]
    foreign = [name for name in kept if not is_parameter((parts_of(name) or [name])[0])]
    if foreign:
        hint = family_hint(foreign)
        what = f" (they look like {hint})" if hint else ""
        if any("mindpet_delta" in name for name in foreign):
            what = " (an adapter: merge it into the base model first, or leave its file out)"
        raise UserError(
            f"{source}: {len(foreign)} of {len(kept)} tensors are of no decoder that is known here{what}: "
            f"{', '.join(foreign[:4])}"
        )
    if state:
        console.info(f"{source}: {len(state)} tensors of training state left out")
    return SelectedTensors(weights, kept)


def _projections(tensors: Mapping[str, np.ndarray], joined: bool) -> ConcatView:
    """The same weights, with all projections split, or all joined."""
    split_names = {part for name in tensors for part in parts_of(name) or [name]}
    split = ConcatView(tensors, split_names)
    if not joined:
        return split
    whole = {joined_of(name) for name in split_names if joined_of(name)}
    whole = {name for name in whole if set(parts_of(name)) <= split_names}  # Falcon has a w1 and no w3
    return ConcatView(split, whole | {name for name in split_names if joined_of(name) not in whole})


def _as_type(head: Head, dtype: str | None) -> Head:
    if dtype is None or not head.dtype.floating:
        return head
    return replace(head, dtype=BY_NAME[FLAG_NAMES[dtype]])


def _reader(tensors: Mapping[str, np.ndarray], heads: Mapping[str, Head], count: int) -> Callable[[str], np.ndarray]:
    """What reads one tensor for the writer, moving the progress bar along."""
    bar = console.progress(count, desc="convert", unit="tensor")

    def read(name: str) -> np.ndarray:
        array = tensors[name]
        check_fits(name, array, heads[name].dtype)
        bar.update(1)
        if bar.n == count:
            bar.close()
        return array

    return read


# ---- a Hugging Face folder


def _named_as(hf_config: Mapping, view: ConcatView) -> HfView:
    """The weights under the names, and in the fused form, of the family that a config.json describes."""
    two_norms = has_two_norms(hf_config_to_model_config(hf_config, seq_length=1))
    return HfView(view, family_of(hf_config), QkvLayout(*qkv_grouping(hf_config)), two_norms)


def _write_companion(path: Path, content: bytes) -> None:
    with StagedFile(path, len(content)) as staged:
        staged.write(content)
        staged.finish()
        staged.commit()


def _write_shards(folder: NewFolder, view: HfView, heads: Mapping[str, Head], max_shard_size: int) -> None:
    shards = _shards(heads, max_shard_size)
    read = _reader(view, heads, len(heads))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard_heads = {name: heads[name] for name in names}
        metadata = {"format": "pt"}  # transformers refuses a file without it
        with StagedFile(folder / file, file_size(".safetensors", shard_heads, metadata)) as staged:
            write_tensors(staged, shard_heads, read, metadata)
            staged.commit()
        index |= dict.fromkeys(shard_heads, file)
    if len(shards) > 1:
        total = sum(head.nbytes for head in heads.values())
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        write_json(folder / "model.safetensors.index.json", content)


def _shards(heads: Mapping[str, Head], limit: int) -> list[list[str]]:
    """Names in order, cut so that a shard's tensors have at most `limit` bytes (or are one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, head in heads.items():
        if shards[-1] and filled + head.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += head.nbytes
    return shards
