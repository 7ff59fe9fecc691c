"""Weights from one format into another: what tools/convert_weight.py does. A tensor at a time, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import BY_NAME, FLAG_NAMES, Head, check_fits
from llm_core.checkpoint.files import WRITABLE, file_size, write_tensors
from llm_core.checkpoint.hf import family_hint, to_hf
from llm_core.checkpoint.locate import weight_files
from llm_core.checkpoint.manifest import Version, commit_with_manifest
from llm_core.checkpoint.qkv import ConcatView, joined_of, parts_of
from llm_core.checkpoint.staged import NewFolder, StagedFile, write_json
from llm_core.checkpoint.state_names import is_state
from llm_core.checkpoint.weights import WeightFiles, open_weights
from llm_core.config.hf_folder import is_hf_folder, model_config_to_hf, read_hf_config
from llm_core.errors import UserError
from llm_core.report.console import console

_HF_CONFIG = "hf_config"  # key of a safetensors file's metadata: the config.json that the weights came with


def to_mindformers(
    source: str | Path, target: str | Path, dtype: str | None = None, qkv_concat: bool = False
) -> Path:
    """Write the weights of `source` as one file under MindFormers' names, with a manifest, and return its path.

    source: anything `open_weights` takes. target: a .safetensors or .ckpt file; a folder gets llama.safetensors.
    dtype: fp32, bf16, fp16 or None, as stored. qkv_concat: join wq, wk, wv and w1, w3. UserError for bad input.
    """
    target = Path(target)
    if not target.suffix or target.is_dir():
        target = target / "llama.safetensors"
    if target.suffix not in WRITABLE:
        raise UserError(f"--output_path: {target}: the name must end in {' or '.join(WRITABLE)}")
    weights = open_weights(source)
    try:
        weights.verify()
        view = _projections(_llama_weights(weights, source), joined=qkv_concat)
        heads = {name: _as_type(head, dtype) for name, head in view.heads.items()}
        metadata = {"format": "ms", **_hf_config_metadata(source, weights)}
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
) -> Path:
    """Write the weights of `source` (MindFormers' names) as a Hugging Face folder and return it.

    target: a folder that is new or empty; it appears when all of it is written. config: a YAML of ours or
    MindFormers', or a config.json; None where `source` is a .safetensors that was converted from a folder with one.
    max_shard_size: bytes of a file's tensors. UserError for bad input.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output_path: {target}: must be a new or empty folder")
    weights = open_weights(source)
    try:
        weights.verify()
        view = _projections(_llama_weights(weights, source), joined=False)
        heads = {name: _as_type(head, dtype) for name, head in view.heads.items()}
        hf_config = _config_for(view, heads, source, config, weights.metadata)
        with NewFolder(target, sum(head.nbytes for head in heads.values())) as folder:
            _write_shards(folder, view, heads, max_shard_size)
            write_json(folder / "config.json", hf_config)
            folder.commit()
    finally:
        weights.close()
    return target


# ---- names, types, projections


class _Selected(Mapping[str, np.ndarray]):
    """Some of a mapping's tensors."""

    def __init__(self, tensors: WeightFiles, names: list[str]):
        self._tensors = tensors
        self.heads = {name: tensors.heads[name] for name in names}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self):
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)


def _llama_weights(weights: WeightFiles, source: str | Path) -> _Selected:
    """The model's own tensors; optimizer state is left out, with one line; a name that no Llama has is refused."""
    state = [name for name in weights if is_state(name, weights)]
    kept = [name for name in weights if not is_state(name, weights)]
    foreign = [name for name in kept if to_hf((parts_of(name) or [name])[0]) is None]
    if foreign:
        hint = family_hint(foreign)
        what = f" (they look like {hint})" if hint else ""
        if any("mindpet_delta" in name for name in foreign):
            what = " (an adapter: merge it into the base model first, or leave its file out)"
        raise UserError(
            f"{source}: {len(foreign)} of {len(kept)} tensors are no Llama's{what}: {', '.join(foreign[:4])}"
        )
    if state:
        console.info(f"{source}: {len(state)} tensors of training state left out")
    return _Selected(weights, kept)


def _projections(tensors: Mapping[str, np.ndarray], joined: bool) -> ConcatView:
    """The same weights, with all projections split, or all joined."""
    split_names = {part for name in tensors for part in parts_of(name) or [name]}
    split = ConcatView(tensors, split_names)
    if not joined:
        return split
    return ConcatView(split, {joined_of(name) or name for name in split_names})


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


# ---- config.json


def _hf_config_metadata(source: str | Path, weights: WeightFiles) -> dict[str, str]:
    folder = weight_files(source)[0].parent
    if is_hf_folder(folder):
        return {_HF_CONFIG: json.dumps(read_hf_config(folder))}
    return {_HF_CONFIG: weights.metadata[_HF_CONFIG]} if _HF_CONFIG in weights.metadata else {}


def _config_for(
    view: ConcatView, heads: Mapping[str, Head], source: str | Path, config: str | Path | None, metadata: Mapping
) -> dict:
    """The config.json for these weights; what it says of their shapes is checked, their type filled in."""
    embedding = heads["model.tok_embeddings.embedding_weight"]
    width = heads["model.layers.0.feed_forward.w1.weight"].shape[0]
    kind = embedding.dtype.name
    if config is None and _HF_CONFIG in metadata:
        origin, content = source, json.loads(metadata[_HF_CONFIG])
    elif config is None:
        raise UserError(
            f"{source}: the weights do not say how many heads the model has, and config.json needs it: name the "
            "model's YAML, or a config.json, with --config"
        )
    elif Path(config).name == "config.json" or Path(config).is_dir():
        origin, content = config, read_hf_config(config if Path(config).is_dir() else Path(config).parent)
    else:
        origin, content = config, _config_of_yaml(config, width, kind)
    in_weights = {
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "intermediate_size": width,
        "num_hidden_layers": sum(name.endswith(".attention_norm.weight") for name in heads),
        "attention_bias": any(name.endswith(".bias") for name in heads),
    }
    for key, value in in_weights.items():
        said = content.get(key, False)
        if said != value:
            raise UserError(f"{origin}: {key} is {said}, but {source} has {value}; name the right --config")
    content["tie_word_embeddings"] = _is_tied(view, bool(content.get("tie_word_embeddings")))
    content.pop("torch_dtype", None)
    content["dtype" if "dtype" in content else "torch_dtype"] = kind
    return content


def _config_of_yaml(path: str | Path, width: int, kind: str) -> dict:
    from llm_core.config import load_config

    model = load_config(path).config.model.config
    return model_config_to_hf(model.model_dump(by_alias=True), intermediate_size=width, dtype=kind)


def _is_tied(view: ConcatView, said: bool) -> bool:
    """Whether the head is the embedding: it is when there is none; a stored one must be equal where config says so."""
    if "lm_head.weight" not in view:
        return True
    return said and np.array_equal(view["lm_head.weight"], view["model.tok_embeddings.embedding_weight"])


# ---- a Hugging Face folder


def _write_shards(folder: NewFolder, view: ConcatView, heads: Mapping[str, Head], max_shard_size: int) -> None:
    shards = _shards(heads, max_shard_size)
    read = _reader(view, heads, len(heads))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        ours = {to_hf(name): name for name in names}
        shard_heads = {theirs: heads[name] for theirs, name in ours.items()}
        metadata = {"format": "pt"}  # transformers refuses a file without it
        with StagedFile(folder / file, file_size(".safetensors", shard_heads, metadata)) as staged:
            write_tensors(staged, shard_heads, lambda theirs, ours=ours: read(ours[theirs]), metadata)
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
