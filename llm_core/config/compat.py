"""What is mapped, a line each: values bound to a device that this machine lacks, and MindFormers' second names."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

from llm_core.config.device_section import ASCEND_ONLY, LAYOUT_KEYS_UNUSED
from llm_core.config.schema import RunConfig
from llm_core.config.tree import Node, Problems, find, plain

_DTYPE_KEYS = (
    "compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type",
    "embedding_init_type",
)  # fmt: skip

SPEED_UP_KEYS = {
    "recompute_comm_overlap": bool,
    "matmul_grad_comm_overlap": bool,
    "enable_task_opt": bool,
    "enable_grad_comm_opt": bool,
    "enable_opt_shard_comm_opt": bool,
    "enable_concat_eliminate_opt": bool,
    "enable_begin_end_inline_opt": bool,
    "compute_communicate_fusion_level": int,
}


# ---- second names ----


def settle_names(tree: Node, problems: Problems) -> Node:
    """The tree with MindFormers' second ways of saying a thing turned into the first.

    `top_k` at the top is model.model_config.top_k; a schedule given as optimizer.learning_rate is lr_schedule; a
    dataset repeated in train_dataset_task or eval_dataset_task must be the same, and is dropped.
    """
    if not isinstance(tree.value, dict):
        return tree
    entries = dict(tree.value)
    top_k, config = entries.get("top_k"), find(tree, "model.model_config")
    if top_k is not None and config is not None and isinstance(config.value, dict):
        entries.pop("top_k")
        if top_k.value is not None:
            model = entries["model"]
            entries["model"] = _with(model, "model_config", _with(config, "top_k", top_k))
    optimizer = entries.get("optimizer")
    rate = optimizer.get("learning_rate") if optimizer is not None else None
    if rate is not None and isinstance(rate.value, dict) and "lr_schedule" not in entries:
        entries["lr_schedule"] = rate
        entries["optimizer"] = Node(
            {k: v for k, v in optimizer.value.items() if k != "learning_rate"}, optimizer.origin
        )
    for name in ("train_dataset", "eval_dataset"):
        task = entries.get(f"{name}_task")
        repeated = task.get("dataset_config") if task is not None else None
        if repeated is None:
            continue
        if name in entries and plain(repeated) != plain(entries[name]):
            problems.add(
                repeated.origin.where, f"{name}_task.dataset_config",
                f"differs from {name} ({entries[name].origin.where}); make it an alias of it, or leave it out",
            )  # fmt: skip
        entries.setdefault(name, repeated)
        rest = {k: v for k, v in task.value.items() if k != "dataset_config"}
        entries[f"{name}_task"] = Node(rest, task.origin)
    return Node(entries, tree.origin)


def _with(node: Node, name: str, child: Node) -> Node:
    return Node({**node.value, name: child}, node.origin)


# ---- the device ----


def present_device() -> str:
    """The device of this machine that runs use: Ascend where its driver shows one, else CPU.

    Never GPU: whether MindSpore's part for CUDA 11 works on a machine shows only when MindSpore starts (docs/cuda.md).
    """
    return "Ascend" if glob.glob("/dev/davinci[0-9]*") else "CPU"


def map_to_device(config: RunConfig, tree: Node, device: str) -> tuple[RunConfig, list[str]]:
    """The config as `device` can run it, and one line for each kind of value that was changed.

    On a CPU everything is computed in float32 (MindSpore's float16 is slower there and overflows), except that
    compute_dtype bfloat16 stays where the kernels have bfloat16 products.
    """
    notes = _notes_on_layout(config)
    context: dict[str, object] = {}
    if config.context.mode == 1:
        context["mode"] = 0
        notes.append(_line(tree, "context.mode", "1 -> 0", "a train step is always compiled"))
    if device == "Ascend":
        notes += _notes_on_types(config)
        return config.model_copy(update={"context": config.context.model_copy(update=context)}), notes
    if config.context.device_target != device:
        context["device_target"] = device
        if find(tree, "context.device_target") is not None:
            wanted = config.context.device_target
            reason = "runs use no GPU" if wanted == "GPU" else f"this machine has no {wanted} device"
            notes.append(_line(tree, "context.device_target", f"{wanted} -> {device}", reason))
    model, lines = _map_model(config, tree)
    notes += lines
    defaults = type(config.context).model_construct()
    unused = [f"context.{name}" for name in ASCEND_ONLY if getattr(config.context, name) != getattr(defaults, name)]
    unused += ["env"] if config.env else []
    if unused:
        notes.append(f"{', '.join(unused)}: checked, but applied on Ascend only")
    update = {"context": config.context.model_copy(update=context), "model": model}
    return config.model_copy(update=update), notes


def _notes_on_layout(config: RunConfig) -> list[str]:
    given = {"auto_trans_ckpt": config.auto_trans_ckpt, "transform_process_num": config.transform_process_num > 1}
    named = [path for path, value in given.items() if value]
    notes = [f"{', '.join(named)}: not needed: weights of any layout are read as what a rank holds"] if named else []
    if config.use_parallel:
        sections = {name: getattr(config, name) for name in LAYOUT_KEYS_UNUSED}
        named = [
            f"{name}.{key}" for name, keys in LAYOUT_KEYS_UNUSED.items() for key in keys
            if getattr(sections[name], key) != type(sections[name]).model_fields[key].default
        ]  # fmt: skip
        notes += [f"{', '.join(named)}: nothing to choose: ranks exchange explicitly"] if named else []
        layout, chunks = config.parallel_config, config.model.config.pp_interleave_num
        unused = {
            "parallel.zero_stage": config.parallel.zero_stage > 0 and layout.data_parallel == 1,
            "parallel_config.use_seq_parallel": layout.use_seq_parallel and layout.model_parallel == 1,
            "parallel_config.micro_batch_num": layout.micro_batch_num > 1 and layout.pipeline_stage == 1,
            "model.model_config.pp_interleave_num": chunks > 1 and layout.pipeline_stage == 1,
        }
        named = [path for path, is_unused in unused.items() if is_unused]
        notes += [f"{', '.join(named)}: not used: the layout has no such ranks"] if named else []
    return notes


def _notes_on_types(config: RunConfig) -> list[str]:
    section = config.model.config
    named = [name for name in _DTYPE_KEYS if getattr(section, name) not in (None, "float32")]
    what = "not verified there: products in bfloat16 if compute_dtype says so, else float32; attention in bfloat16"
    return [f"model.model_config {', '.join(named)}: {what}"] if named else []


def _map_model(config: RunConfig, tree: Node) -> tuple[object, list[str]]:
    section, notes, update = config.model.config, [], {}
    for narrow, reason in (("float16", "slower on a CPU, and overflows"), ("bfloat16", "this CPU computes in float32")):
        names = [name for name in _DTYPE_KEYS if getattr(section, name) == narrow]
        if narrow == "bfloat16" and "compute_dtype" in names and _has_bf16_products():
            names.remove("compute_dtype")
            reason = "only products are bfloat16 on a CPU"
        update.update(dict.fromkeys(names, "float32"))
        given = [name for name in names if find(tree, f"model.model_config.{name}") is not None]
        if given:
            notes.append(f"model.model_config {', '.join(given)}: {narrow} -> float32: {reason}")
    notes += _notes_on_factors(section.pet_config)
    return config.model.model_copy(update={"config": section.model_copy(update=update)}), notes


def _notes_on_factors(pet: Any) -> list[str]:
    """Types that pet_config gives to an adapter: its factors are float32, and products as the kernels have them."""
    if pet is None:
        return []
    narrow = ("float16", "bfloat16")
    wanted = {"param_init_type": narrow, "compute_dtype": narrow[:1] if _has_bf16_products() else narrow}
    names = [name for name, types in wanted.items() if getattr(pet, name, None) in types]
    return [f"model.model_config.pet_config {', '.join(names)}: -> float32 on a CPU"] if names else []


def _has_bf16_products() -> bool:
    """Whether the kernels that a run on this CPU would take can multiply bfloat16 numbers."""
    from llm_core import kernels

    return (os.environ.get("KERNELS") or kernels.available()[0]) == "avx512_bf16"


def _line(tree: Node, path: str, change: str, reason: str) -> str:
    node = find(tree, path)
    where = f" ({node.origin.where})" if node is not None else ""
    return f"{path}: {change}{where}: {reason}"


# ---- parallel_speed_up.json ----


def check_speed_up_file(config: RunConfig, tree: Node, device: str, problems: Problems) -> list[str]:
    """Check the file of ascend_config.parallel_speed_up_json_path: known keys, right types. It must exist on Ascend."""
    path = "context.ascend_config.parallel_speed_up_json_path"
    ascend = config.context.ascend_config
    if ascend is None or not ascend.parallel_speed_up_json_path:
        return []
    name = ascend.parallel_speed_up_json_path
    where = find(tree, path).origin.where
    if not os.path.exists(name):
        if device == "Ascend":
            problems.add(where, path, f"{name}: no such file")
            return []
        return [f"{path}: {name} does not exist; it would be needed on Ascend"]
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        problems.add(f"{name}:{error.lineno}", "", f"not valid JSON: {error.msg}")
        return []
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        problems.add(where, path, f"{name}: {error}")
        return []
    _check_speed_up(name, content, problems)
    return []


def _check_speed_up(name: str, content: object, problems: Problems) -> None:
    import difflib

    if not isinstance(content, dict):
        problems.add(name, "", "must be a JSON object")
        return
    for key, value in content.items():
        kind = SPEED_UP_KEYS.get(key)
        if kind is None:
            near = difflib.get_close_matches(key, SPEED_UP_KEYS, 1)
            problems.add(name, key, "unknown key" + (f"; did you mean {near[0]}?" if near else ""))
        elif type(value) is not kind:
            wanted = {"bool": "true or false", "int": "a whole number"}[kind.__name__]
            problems.add(name, key, f"{value!r} is not {wanted}")
