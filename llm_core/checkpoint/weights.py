"""Weights from any file or folder, under MindFormers' names, and into a network."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_core.checkpoint import meta_llama
from llm_core.checkpoint.dtypes import Head
from llm_core.checkpoint.files import TensorFile
from llm_core.checkpoint.gguf import GgufFile
from llm_core.checkpoint.hf import family_hint, from_hf, is_buffer
from llm_core.checkpoint.hf_fused import without_fused
from llm_core.checkpoint.locate import rank_files, weight_files
from llm_core.checkpoint.manifest import verified_version
from llm_core.checkpoint.qkv import ConcatView
from llm_core.checkpoint.reshard import RankFiles, Share, open_by_strategy, open_ranks, read_part, shards_of
from llm_core.checkpoint.state_names import is_state
from llm_core.checkpoint.strategy import Box, read_strategy
from llm_core.errors import UserError
from llm_core.models.spec import HEAD_NAMES
from llm_core.text.gguf_tokenizer import tokenizer_files

if TYPE_CHECKING:
    from mindspore import nn

_SHOWN = 4
_CLASSIFIER_HEADS = tuple(f"{name}." for head, name in HEAD_NAMES.items() if head != "causal")


class LazyTensors(Mapping[str, np.ndarray]):
    """Tensors whose names and heads are known, and whose values are made when they are asked for.

    heads: name -> element type and shape.
    """

    heads: dict[str, Head]

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, name: object) -> bool:
        return name in self.heads


class SelectedTensors(LazyTensors):
    """Some of a mapping's tensors."""

    def __init__(self, tensors: LazyTensors, names: Iterable[str]):
        self._tensors = tensors
        self.heads = {name: tensors.heads[name] for name in names}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.heads:
            raise KeyError(name)
        return self._tensors[name]


class WeightFiles(LazyTensors):
    """The tensors of one or more open weight files, by name; a value is read from disk when it is asked for.

    heads: name -> element type and shape, known without reading. metadata: of the safetensors files, merged.
    """

    def __init__(self, files: list[TensorFile]):
        self._files = files
        self._places: dict[str, tuple[TensorFile, str]] = {}
        self.heads: dict[str, Head] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            self.metadata.update(file.metadata)
            for name in file.heads:
                self._place(name, file)

    def _place(self, stored_name: str, file: TensorFile) -> None:
        name = from_hf(stored_name) or stored_name
        if is_buffer(name):
            return
        if name in self._places:
            other = self._places[name][0]
            if is_state(name, self.heads):
                return
            raise UserError(f"{name} is in {other.path} and in {file.path}; name the one file to load")
        self._places[name] = (file, stored_name)
        self.heads[name] = file.heads[stored_name]

    def __getitem__(self, name: str) -> np.ndarray:
        file, stored_name = self._places[name]
        return file.read(stored_name)

    def part(self, name: str, box: Box) -> np.ndarray:
        """A part of a tensor, as a new array."""
        file, stored_name = self._places[name]
        return read_part(file, stored_name, box)

    @property
    def files(self) -> list[TensorFile]:
        """The open files."""
        return self._files

    def verify(self) -> None:
        """Check every file against its manifest, or its own crc where it has no manifest."""
        for file in self._files:
            if isinstance(file, RankFiles) or verified_version(file.path) is None:
                file.verify()

    def companions(self) -> dict[str, bytes]:
        """Files that belong beside the weights and that a weight file carries: a GGUF's tokenizer. Name -> content."""
        return {
            name: content
            for file in self._files
            if isinstance(file, GgufFile)
            for name, content in tokenizer_files(file.fields, str(file.path)).items()
        }

    def close(self) -> None:
        for file in self._files:
            file.close()


def open_weights(path: str | Path, strategy: str | Path = "") -> WeightFiles:
    """Open what `path` stands for (see `locate.weight_files`), lazily, under MindFormers' names.

    Hugging Face's names are mapped and its fused projections split, Meta's files merged and permuted, the files that
    the ranks of a run have saved put together: what comes out is whole. Nothing in a file is executed.
    strategy: MindSpore's strategy file, or folder of such, of files that do not say themselves what they hold of what.
    Raises UserError for a missing, damaged or foreign file.
    """
    files = weight_files(path)
    if strategy and shards_of(files[0]) is None:
        return WeightFiles([open_by_strategy(rank_files(path), read_strategy(strategy))])
    if meta_llama.is_meta(files):
        return WeightFiles([meta_llama.MetaLlama(files)])
    return WeightFiles([without_fused(open_ranks(file)) for file in files])


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of `open_weights(path)`, verified and in memory (bfloat16 as float32)."""
    weights = open_weights(path)
    try:
        weights.verify()
        return dict(weights)
    finally:
        weights.close()


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did: parameter names, except `unexpected` (names of the file) and `shape_mismatch` (name,
    shape in the file, shape in the model)."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shape_mismatch: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def fresh_head(self) -> list[str]:
        """Of the missing: the head of a classifier, which starts fresh, since no base model has it."""
        return [name for name in self.missing if name.startswith(_CLASSIFIER_HEADS)]

    def line(self) -> str:
        """One line for the log."""
        text = f"{len(self.matched)} parameters matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                text += f"; {what}: {_first(names)}"
        if self.fresh_head:
            text += " (the classifier's head, which starts fresh)"
        return text


def load_into(
    net: nn.Cell,
    tensors: Mapping[str, np.ndarray],
    *,
    strict: bool = True,
    source: str | Path = "the checkpoint",
    share: Share | None = None,
    seen: Callable[[str, np.ndarray], None] | None = None,
) -> LoadReport:
    """Set the parameters of `net` from `tensors` (MindFormers' names), cast to each parameter's type.

    Joined and split projections (qkv_concat) are converted to what the net has; optimizer state is left out. A head
    that the net ties to its embedding is accepted when the file's head is that embedding. `source` is named in errors.
    share: what the net, a rank's, holds of the model; `tensors` are whole and cut one after the other.
    seen: gets every whole tensor that is loaded, with its name.
    UserError, with the net untouched: no name matches; a shape differs; with `strict`, a parameter that belongs to
    the base model (not to an adapter, nor the head of a classifier, which starts fresh) is missing.
    """
    parameters = net.parameters_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if share is not None:
        shapes = {name: share.whole(name) or shape for name, shape in shapes.items()}
    report = compare(tensors, shapes, elsewhere=() if share is None else share.cuts)
    _refuse_misfit(report, tensors, strict, source)
    import mindspore

    view = ConcatView(tensors, parameters)
    for name in report.matched:
        parameter, whole = parameters[name], view[name]
        if seen is not None:
            seen(name, whole)
        own = whole if share is None else whole[share.box(name, whole.shape)]
        parameter.set_data(mindspore.Tensor(np.ascontiguousarray(own), dtype=parameter.dtype))
    return report


def compare(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], elsewhere: Container[str] = ()
) -> LoadReport:
    """The report that loading would give, from heads alone. shapes: of the model's parameters, by name. elsewhere:
    parameters that other ranks hold, which are not unexpected."""
    view = ConcatView(tensors, shapes)
    report = LoadReport()
    for name, shape in shapes.items():
        if name not in view:
            report.missing.append(name)
        elif view.shape(name) != shape:
            report.shape_mismatch.append((name, view.shape(name), shape))
        else:
            report.matched.append(name)
    for name in view:
        if name in shapes or name in elsewhere or is_state(name, shapes) or is_state(name, tensors):
            continue
        if name == "lm_head.weight" and _is_the_embedding(tensors):
            continue
        report.unexpected.append(name)
    return report


def _is_the_embedding(tensors: Mapping[str, np.ndarray]) -> bool:
    embedding = "model.tok_embeddings.embedding_weight"
    return embedding in tensors and np.array_equal(tensors["lm_head.weight"], tensors[embedding])


def _refuse_misfit(report: LoadReport, tensors: Mapping, strict: bool, source: str | Path) -> None:
    found = {*report.matched, *(name for name, *_ in report.shape_mismatch)}
    if not found - {"lm_head.weight"}:  # a name that Hugging Face's files share
        hint = family_hint(tensors)
        looks = f"; they look like {hint}" if hint else ""
        raise UserError(
            f"load_checkpoint: {source}: none of its {len(tensors)} names is a parameter of this model{looks}. "
            f"The file has {_first(list(tensors))}; the model has {_first(report.missing)}. "
            "Check model.arch and the file, or convert it with tools/convert_weight.py"
        )
    if report.shape_mismatch:
        shown = "; ".join(
            f"{name} is {list(theirs)} in the file and {list(ours)} in the model"
            for name, theirs, ours in report.shape_mismatch[:_SHOWN]
        )
        way_out = (
            "Check model.model_config (hidden_size, num_layers, num_heads, n_kv_heads, vocab_size) against the file"
        )
        if _of_several_ranks(source):
            way_out += (
                "; if these are slices that the ranks of a run saved, name its strategy file, or the folder of such "
                "files, with --src_strategy_path_or_dir"
            )
        raise UserError(
            f"load_checkpoint: {source}: {len(report.shape_mismatch)} of its tensors have another shape: {shown}. "
            f"{way_out}"
        )
    base = [name for name in report.missing if "mindpet_delta" not in name and name not in report.fresh_head]
    if strict and base:
        way_out = "check model.model_config.num_layers and the file"
        if base == ["lm_head.weight"]:
            way_out = "if its head is tied to the embedding, set model.model_config.tie_word_embeddings True"
        raise UserError(
            f"load_checkpoint: {source}: {len(base)} of the model's {len(base) + len(report.matched)} parameters are "
            f"not in it: {_first(base)}; {way_out}"
        )


def _of_several_ranks(source: str | Path) -> bool:
    """Whether a folder holds rank_0, rank_1 ..."""
    try:
        return len(rank_files(source)) > 1
    except UserError:
        return False


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
