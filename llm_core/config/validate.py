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


def check_runnable(
    config: RunConfig, tree: Node, file: str, problems: Problems, prompts: bool, started: bool
) -> None:
    """Add to `problems` what keeps the run mode of `config` from starting; see `LoadedConfig.require_runnable`."""

    def where(path: str) -> str:
        return nearest_origin(tree, path).where if find(tree, path) is not None else file

    def need(condition: bool, path: str, what: str) -> None:
        if not condition:
            problems.add(where(path), path, what)

    mode = config.run_mode
    need(mode is not None, "run_mode", "is not given; add --run_mode train, finetune, eval or predict")
    if config.use_parallel:
        _need_layout(config, need)
        if started:
            _need_ranks(config, need)
    need(
        not config.only_save_strategy or (config.use_parallel and _ranks(config) > 1), "only_save_strategy",
        "one process has no layout to save; set it to False",
    )
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


def _need_ranks(config: RunConfig, need: Any) -> None:
    """As many processes as the layout has ranks."""
    layout, ranks = config.parallel_config, _ranks(config)
    sizes = (layout.data_parallel, layout.model_parallel, layout.pipeline_stage)
    sizes_given = (os.environ.get(name, "") for name in ("MS_WORKER_NUM", "RANK_SIZE"))
    started = next((int(size) for size in sizes_given if size.isdecimal()), 1)
    product = " x ".join(map(str, sizes))
    need(
        started == ranks, "parallel_config" if started > 1 else "use_parallel",
        f"data_parallel x model_parallel x pipeline_stage = {product} = {ranks} ranks, and {started} "
        f"{'is' if started == 1 else 'are'} started: start them with "
        f'bash scripts/msrun_launcher.sh "run_llm.py ..." {ranks}, or add --use_parallel False',
    )  # fmt: skip


def _ranks(config: RunConfig) -> int:
    layout = config.parallel_config
    return layout.data_parallel * layout.model_parallel * layout.pipeline_stage


def _need_layout(config: RunConfig, need: Any) -> None:
    """Nothing that several ranks cannot do."""
    layout = config.parallel_config
    need(
        config.parallel.full_batch or layout.model_parallel * layout.pipeline_stage == 1, "parallel.full_batch",
        "False is not supported with model_parallel or pipeline_stage: batch_size is that of a data_parallel rank; "
        "set it to True",
    )  # fmt: skip
    offset = config.model.config.offset
    need(not isinstance(offset, int) or offset == 0, "model.model_config.offset", "is a list, a number for each stage")
    need(layout.context_parallel == 1, "parallel_config.context_parallel", "a sequence is not shared between ranks")
    need(layout.expert_parallel == 1, "parallel_config.expert_parallel", "no family here has experts; set it to 1")
    stages = layout.pipeline_stage
    need(
        stages == 1 or layout.micro_batch_num >= stages, "parallel_config.micro_batch_num",
        f"{layout.micro_batch_num} is below pipeline_stage {stages}: stages would idle; take {stages} or more",
    )  # fmt: skip
    if stages > 1:
        need(config.run_mode != "predict", "parallel_config.pipeline_stage", "prediction does not run in a pipeline: 1")
        need(config.callback("SampleMonitor") is None, "callbacks", "SampleMonitor does not run in a pipeline")
        writes = config.model.arch.type.endswith("ForCausalLM")
        need(writes or not config.do_eval, "do_eval", "a classifier in a pipeline is not measured: set it to False")
    if config.run_mode in ("train", "finetune"):
        _need_trainable_layout(config, need)


def _need_trainable_layout(config: RunConfig, need: Any) -> None:
    """Of a layout, what only training needs: evaluation and prediction use neither ZeRO nor sequence parallelism."""
    layout, model, context = config.parallel_config, config.model.config, config.parallel
    zero = context.zero if layout.data_parallel > 1 else 0
    options = context.parallel_optimizer_config
    need(
        options is None or zero == 0 or options.optimizer_weight_shard_size in (-1, layout.data_parallel),
        "parallel.parallel_optimizer_config.optimizer_weight_shard_size",
        f"what is shared out is shared by all data_parallel ranks: -1, or {layout.data_parallel}",
    )
    need(
        not layout.optimizer_shard or zero > 0 or layout.data_parallel == 1, "parallel_config.optimizer_shard",
        "is the old name: set parallel.enable_parallel_optimizer True",
    )
    optimizer = config.optimizer.type if config.optimizer is not None else ""
    need(
        not optimizer.lower().startswith("adafactor") or (zero == 0 and layout.model_parallel == 1), "optimizer.type",
        f"{optimizer} needs whole matrices, which no rank has under model_parallel or ZeRO: take AdamW",
    )  # fmt: skip
    need(
        not getattr(model.pet_config, "use_dora", False) or (zero < 3 and layout.model_parallel == 1),
        "model.model_config.pet_config.use_dora",
        "needs whole weights, which no rank has under model_parallel or zero_stage 3: take plain LoRA",
    )
    if layout.use_seq_parallel and layout.model_parallel > 1:
        need(config.callback("SampleMonitor") is None, "callbacks", "SampleMonitor does not run with use_seq_parallel")
        rows = config.runner_config.batch_size * model.seq_length
        need(
            rows % layout.model_parallel == 0, "parallel_config.use_seq_parallel",
            f"batch_size x seq_length = {rows} is not a multiple of model_parallel {layout.model_parallel}",
        )  # fmt: skip


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
