"""The config.json that goes with weights: remembered from the folder they came from, or made of a YAML; and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.checkpoint.dtypes import FLAG_NAMES, Head
from llm_core.checkpoint.locate import weight_files
from llm_core.checkpoint.qkv import ConcatView
from llm_core.checkpoint.weights import WeightFiles
from llm_core.config.hf_export import model_config_to_hf
from llm_core.config.hf_folder import family_of, hf_config_to_model_config, is_hf_folder, read_hf_config
from llm_core.config.hf_keys import FAMILIES
from llm_core.errors import UserError
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import HEAD_NAMES, spec_from_config

_KEY = "hf_config"  # of a safetensors file's metadata
_EMBEDDING, _HEAD = "model.tok_embeddings.embedding_weight", "lm_head.weight"
_EVERY_HEAD = {f"{name}.{kind}" for name in HEAD_NAMES.values() for kind in ("weight", "bias")}


def hf_config_metadata(source: str | Path, weights: WeightFiles, family: str | None = None) -> dict[str, str]:
    """Metadata for the file that the weights of `source` become: the config.json they came with, if any.

    UserError where that names another family than `family` (None = any), or what the decoder does not compute.
    """
    folder = weight_files(source)[0].parent
    if is_hf_folder(folder):
        content = read_hf_config(folder)
        _require_family(content, family, folder / "config.json")
        hf_config_to_model_config(content, str(folder / "config.json"), seq_length=1)
        return {_KEY: json.dumps(content)}
    return {_KEY: weights.metadata[_KEY]} if _KEY in weights.metadata else {}


def config_for(
    view: ConcatView,
    source: str | Path,
    config: str | Path | None,
    metadata: Mapping[str, str],
    family: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The config.json for these weights (MindFormers' names, split projections): checked, and their type filled in.

    config: a YAML, a config.json or its folder; None = what the file remembers. family: a model_type; None = the one
    that the configuration is named for. dtype: as the flag, None = as stored. UserError when there is none, or it does
    not fit the weights.
    """
    for name in (_EMBEDDING, "model.layers.0.feed_forward.w1.weight"):
        if name not in view:
            raise UserError(f"{source}: {name} is missing: these are not a whole model's weights")
    if config is None and _KEY in metadata:
        origin, content = source, json.loads(metadata[_KEY])
    elif config is None:
        raise UserError(
            f"{source}: the weights do not say how many heads the model has, and config.json needs it: name the "
            "model's YAML, or a config.json, with --config"
        )
    elif Path(config).name == "config.json" or Path(config).is_dir():
        origin, content = config, read_hf_config(config if Path(config).is_dir() else Path(config).parent)
    else:
        origin, content = config, _of_yaml(config, view.heads, family)
    _require_family(content, family, origin)
    ours = hf_config_to_model_config(content, str(origin), seq_length=1)
    _require_fit(ours, view.heads, origin, source)
    kind = FLAG_NAMES[dtype] if dtype else view.heads[_EMBEDDING].dtype.name
    content["tie_word_embeddings"] = _is_tied(view, bool(ours["tie_word_embeddings"]))
    content.pop("torch_dtype", None)
    content["dtype" if "dtype" in content else "torch_dtype"] = kind
    return content | _of_classifier(content, view)


def _of_classifier(content: Mapping[str, Any], view: ConcatView) -> dict[str, Any]:
    """What a config.json says of the head that the weights have, where that is a classifier's."""
    if "qa_outputs.weight" in view:
        head, classes = "ForQuestionAnswering", 2
    elif "score.weight" in view:
        head = "ForTokenClassification" if "score.bias" in view else "ForSequenceClassification"
        classes = view.heads["score.weight"].shape[0]
    else:
        return {}
    labels = {str(number): f"LABEL_{number}" for number in range(classes)}
    return {
        "architectures": [FAMILIES[family_of(content)].name + head],
        "id2label": labels,
        "label2id": {label: int(number) for number, label in labels.items()},
    }


def _require_family(content: Mapping[str, Any], family: str | None, origin: str | Path) -> None:
    found = family_of(content, str(origin))
    if family is not None and found != family:
        raise UserError(f"--model {family}: {origin} says model_type {found!r}; give --model {found}")


def _of_yaml(path: str | Path, heads: Mapping[str, Head], family: str | None) -> dict[str, Any]:
    from llm_core.config import load_config

    model = load_config(path).config.model.config
    width = heads["model.layers.0.feed_forward.w1.weight"].shape[0]
    return model_config_to_hf(model.model_dump(by_alias=True), intermediate_size=width, family=family)


def _require_fit(ours: Mapping[str, Any], heads: Mapping[str, Head], origin: str | Path, source: str | Path) -> None:
    """UserError, naming the first thing that differs, unless the configuration describes these weights."""
    vocab, hidden = heads[_EMBEDDING].shape
    in_weights = {
        ("vocab_size", "vocab_size"): vocab,
        ("hidden_size", "hidden_size"): hidden,
        ("num_hidden_layers", "num_layers"): sum(name.endswith(".attention_norm.weight") for name in heads),
    }
    for (theirs, key), value in in_weights.items():
        if ours[key] != value:
            raise UserError(f"{origin}: {theirs} is {ours[key]}, but {source} has {value}; name the right --config")
    expected = _shapes(ours)
    for name in sorted({*expected, *heads} - _EVERY_HEAD):
        wanted, found = expected.get(name), heads[name].shape if name in heads else None
        if wanted != found:
            shown = [list(shape) if shape is not None else "absent" for shape in (wanted, found)]
            raise UserError(
                f"{origin}: {name} would be {shown[0]}, but it is {shown[1]} in {source}; name the right --config"
            )


def _shapes(ours: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that these `model_config` keys ask for."""
    from llm_core.config.model_section import ModelSection

    arch = {"type": f"{ours['type'].removesuffix('Config')}ForCausalLM"}
    return parameter_shapes(spec_from_config(ModelSection.model_validate({"arch": arch, "model_config": dict(ours)})))


def _is_tied(view: ConcatView, said: bool) -> bool:
    """Whether the head is the embedding: it is when there is none; a stored one must be equal where config says so."""
    if _HEAD not in view:
        return True
    return said and np.array_equal(view[_HEAD], view[_EMBEDDING])
