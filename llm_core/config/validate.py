"""The schema applied to a tree, its complaints in plain words with file and line; and what a run needs to start."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any

from pydantic import ValidationError

from llm_core.config import keys
from llm_core.config.schema import RunConfig
from llm_core.config.tree import Node, Origin, Problems, find, join, nearest_origin, plain


def validate(tree: Node, problems: Problems) -> RunConfig | None:
    """The checked config, or None after adding what is wrong to `problems`."""
    values = plain(tree)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        grouped: dict[str, list[dict[str, Any]]] = {}
        for each in error.errors(include_url=False):
            grouped.setdefault(_path_of(each, values), []).append(each)
        for path, complaints in grouped.items():
            _report(tree, path, complaints, problems)
        return None


def _path_of(error: dict[str, Any], values: Any) -> str:
    """The key's dotted path: pydantic's location without the names of the union branches it tried."""
    path, node = "", values
    for part in error["loc"]:
        if isinstance(node, dict) and part in node or isinstance(node, list) and isinstance(part, int):
            path, node = join(path, part), node[part]
    return join(path, error["loc"][-1]) if error["type"] == "missing" else path


def _report(tree: Node, path: str, complaints: list[dict[str, Any]], problems: Problems) -> None:
    if any(problem.key == path for problem in problems.found):
        return  # said already, in better words
    origin = nearest_origin(tree, path)
    first = complaints[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        problems.add(origin.where, path, "unknown key")
    elif kind == "missing":
        problems.add(origin.where, path, "is required; add it")
    elif kind == "value_error":
        text = str(context["error"])
        problems.add(_guilty(tree, path, text, origin).where, path, text)
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        _report_type(tree, path, context, problems)
    elif kind == "literal_error":
        allowed = [part.strip("'") for part in re.split(r", | or ", context["expected"])]
        problems.add(
            origin.where, path, f"{first['input']!r} is none of {', '.join(allowed)}" + _near(first["input"], allowed)
        )
    else:
        said = " or ".join(dict.fromkeys(_plain_words(each) for each in complaints))
        value = first["input"]
        shown = (
            repr(value) if not isinstance(value, dict | list) or len(str(value)) < 60 else f"a {type(value).__name__}"
        )
        problems.add(origin.where, path, f"{shown}: {said}")


def _report_type(tree: Node, path: str, context: dict[str, Any], problems: Problems) -> None:
    """A section whose `type` is missing or unknown."""
    section = find(tree, path)
    name = str(context.get("discriminator", "type")).strip("'").removesuffix("()")
    name = name if name in ("type", "pet_type") else "type"
    shape = keys.shape_at(RunConfig, tree, path)
    allowed = [tag for tag in shape.sections if tag] if shape is not None else []
    tag = section.get(name) if section is not None else None
    listed = f"one of {', '.join(allowed)}"
    if tag is None:
        where = nearest_origin(tree, path).where
        problems.add(where, join(path, name), f"is required; {listed}")
    else:
        problems.add(tag.origin.where, join(path, name), f"{tag.value!r} is not {listed}" + _near(tag.value, allowed))


def _near(value: Any, allowed: list[str]) -> str:
    exact = {each.lower(): each for each in allowed}.get(str(value).lower())
    near = [exact] if exact else difflib.get_close_matches(str(value), allowed, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _plain_words(error: dict[str, Any]) -> str:
    message = error["msg"].removeprefix("Input ")
    return message[:1].lower() + message[1:]


def _guilty(tree: Node, path: str, text: str, fallback: Origin) -> Origin:
    """Of the keys that a section's complaint names, the origin of the one written last."""
    named = [find(tree, join(path, word)) for word in re.findall(r"\w+(?:\.\w+)*", text)]
    found = [node.origin for node in named if node is not None]
    return max(found, key=lambda origin: origin.rank, default=fallback)


# ---- what a run needs ----


def check_runnable(config: RunConfig, tree: Node, file: str, problems: Problems, prompts: bool) -> None:
    """Add to `problems` what keeps the run mode of `config` from starting."""

    def where(path: str) -> str:
        return nearest_origin(tree, path).where if find(tree, path) is not None else file

    def need(condition: bool, path: str, what: str) -> None:
        if not condition:
            problems.add(where(path), path, what)

    mode = config.run_mode
    need(mode is not None, "run_mode", "is not given; add --run_mode train, finetune, eval or predict")
    if config.use_parallel:
        _need_launcher(where("use_parallel"), problems)
    need(not config.only_save_strategy, "only_save_strategy", "one process has no layout to save; set it to False")
    if mode in ("train", "finetune"):
        _need_training(config, need)
    measures_records = mode == "eval" and any(metric.type != "ChoiceMetric" for metric in config.metric)
    if measures_records or (config.do_eval and mode in ("train", "finetune")):
        has_data = config.eval_dataset is not None and config.eval_dataset.data_loader.dataset_dir
        need(bool(has_data), "eval_dataset.data_loader.dataset_dir", "no evaluation data; add --eval_dataset_dir FILE")
    writes = config.model.arch.type.endswith("ForCausalLM")
    need(writes or mode != "predict", "model.arch.type", "a classifier writes no text; --run_mode eval measures it")
    need(writes or config.callback("SampleMonitor") is None, "callbacks", "SampleMonitor: a classifier writes no text")
    if mode == "predict" and prompts:
        need(
            bool(config.predict_data or config.input_data),
            "predict_data",
            'no prompt; add --predict_data "..." or a file',
        )


def _need_launcher(where: str, problems: Problems) -> None:
    ranks = os.environ.get("RANK_SIZE") or os.environ.get("MS_WORKER_NUM")
    if ranks is None:
        what = "True, but runs of several ranks are not built yet; add --use_parallel False"
        problems.add(where, "use_parallel", what)
    elif ranks != "1":
        problems.add(where, "use_parallel", f"{ranks} ranks, but runs of several ranks are not built yet; start one")


def _need_training(config: RunConfig, need: Any) -> None:
    has_data = config.train_dataset is not None and config.train_dataset.data_loader.dataset_dir
    need(bool(has_data), "train_dataset.data_loader.dataset_dir", "no training data; add --train_dataset_dir FILE")
    need(config.optimizer is not None, "optimizer", "is required to train; add a section with a type, such as AdamW")
    if config.optimizer is None:
        return
    best = any(getattr(callback, "keep_best", None) for callback in config.callbacks)
    need(
        config.do_eval or not best, "callbacks", "keep_best needs evaluations during training; add --do_eval True"
    )
    schedule = config.lr_schedule
    rate = getattr(schedule, "learning_rate", getattr(schedule, "base_lr", None))
    need(
        rate is not None or config.optimizer.learning_rate is not None, "lr_schedule.learning_rate",
        "no learning rate; give lr_schedule.learning_rate or optimizer.learning_rate",
    )  # fmt: skip
