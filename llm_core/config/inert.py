"""Keys of MindFormers' files that mean nothing here: one table, each with the reason.

They are taken out before the schema sees the file, and the run prints one line that lists those it saw. A few are
harmless only with certain values (`only`); with another one they are an error, since ignoring them would give another
result than the file asks for. In a path, `callbacks[X]` is the item of type X, and `a.*` is every other key of `a`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inert:
    """Why a key means nothing; `only`, when given, lists the values with which that is true."""

    reason: str
    only: tuple[Any, ...] | None = None

    def allows(self, value: Any) -> bool:
        """Whether this value may be ignored."""
        return self.only is None or any(value == allowed and type(value) is type(allowed) for allowed in self.only)


_RUNTIME = "MindFormers writes it at run time"
_VISION = "for vision models; MindFormers ignores it for language models"
_LOADER = "the loader is one thread that stays ahead of the device"
_PROFILER = "an option of MindSpore's profiler; profile_start_step and profile_stop_step are read"
_ASCEND_GRAPH = "an option of MindFormers' Ascend graph that changes no number"
_TOKENIZER = "the tokenizer's file says it"
_DECODE = "generation always uses a key/value cache of static shape"
_COLLECTIVES = "the collectives of a recomputed layer are repeated with it"
_OFF = (None, False)

INERT: dict[str, Inert] = {
    # top level
    "task": Inert("run_llm trains, evaluates and prompts language models", ("text_generation", None)),
    "load_ckpt_format": Inert("the format of load_checkpoint is seen from the file"),
    "ignore_data_skip": Inert("a checkpoint holds the exact place in the data, and resuming takes it up", _OFF),
    "data_skip_steps": Inert("a checkpoint holds the exact place in the data, and resuming takes it up", (None, 0)),
    "micro_batch_interleave_num": Inert("multiply batch_size or gradient_accumulation_steps by it", (None, 1)),
    "layer_scale": Inert(_VISION),
    "layer_decay": Inert(_VISION),
    "lr_scale": Inert("the rate is lr_schedule.learning_rate as given", _OFF),
    "lr_scale_factor": Inert("works with lr_scale only"),
    "auto_tune": Inert(_LOADER),
    "filepath_prefix": Inert("works with auto_tune only"),
    "autotune_per_step": Inert("works with auto_tune only"),
    "init_start_profile": Inert(_PROFILER),
    "profile_communication": Inert(_PROFILER),
    "profile_memory": Inert(_PROFILER),
    "profile_rank_ids": Inert(_PROFILER),
    "profile_pipeline": Inert(_PROFILER),
    "profile_level": Inert(_PROFILER),
    "remote_save_url": Inert("nothing is uploaded"),
    "use_legacy": Inert("there is one implementation"),
    "use_legacy_format": Inert("there is one implementation"),
    "pretrained_model_dir": Inert("give the folder as load_checkpoint", (None, "")),
    "trust_remote_code": Inert("code is loaded from --register_path on the command line only"),
    "auto_map": Inert("code is loaded from --register_path on the command line only"),
    "eval_callbacks": Inert("evaluation prints and writes its own results"),
    "moe_config.expert_num": Inert("no family here has experts", (None, 1)),
    "moe_config.*": Inert("no family here has experts"),
    "swap_config": Inert("activations are not swapped to the host"),
    "monitor_config": Inert("metrics.jsonl holds loss, norm, rate and scale of every step"),
    # sections
    "runner_config.num_classes": Inert("for classifiers of images"),
    "runner_config.origin_epochs": Inert(_RUNTIME),
    "runner_config.initial_epoch": Inert(_RUNTIME),
    "runner_config.initial_step": Inert(_RUNTIME),
    "runner_config.global_batch_size": Inert(_RUNTIME),
    "runner_config.step_scale": Inert(_RUNTIME),
    "optimizer.use_fused": Inert("the fused kernel is used where there is one"),
    "runner_wrapper.local_norm": Inert("the global norm is printed", _OFF),
    "processor.return_tensors": Inert("prompts never become tensors of a framework"),
    "processor.tokenizer.unk_token": Inert(_TOKENIZER),
    "processor.tokenizer.bos_token": Inert(_TOKENIZER),
    "processor.tokenizer.eos_token": Inert(_TOKENIZER),
    "processor.tokenizer.pad_token": Inert(_TOKENIZER),
    "processor.tokenizer.model_max_length": Inert("model.model_config.seq_length says it"),
    "context.train_precision_sync": Inert("Ascend only, and not used here"),
    "context.infer_precision_sync": Inert("Ascend only, and not used here"),
    "context.postprocess_use_numpy": Inert("sampling is numpy in any case"),
    "context.exclude_cann_cpu": Inert("Ascend only, and not used here"),
    "context.affinity_cpu_list": Inert("threads are placed by the system"),
    "recompute_config.parallel_optimizer_comm_recompute": Inert(_COLLECTIVES),
    "recompute_config.select_comm_recompute": Inert(_COLLECTIVES),
    "recompute_config.mp_comm_recompute": Inert(_COLLECTIVES),
    "recompute_config.recompute_slice_activation": Inert(_COLLECTIVES),
    "recompute_config.select_recompute_exclude": Inert("nothing is excluded", (None, False)),
    "recompute_config.select_comm_recompute_exclude": Inert(_COLLECTIVES),
    # callbacks
    "callbacks[ObsMonitor]": Inert("nothing is uploaded"),
    "callbacks[ProfileMonitor]": Inert("set profile: True"),
    "callbacks[EvalCallBack]": Inert("set do_eval: True"),
    "callbacks[TrainCallBack]": Inert("set runner_config.stop_step"),
    "callbacks[CheckpointMonitor].integrated_save": Inert("a checkpoint is always whole, or a rank's own part"),
    "callbacks[CheckpointMonitor].async_save": Inert("a checkpoint is on the disk before the next step begins"),
    "callbacks[CheckpointMonitor].exception_save": Inert("a checkpoint is written at SIGINT and SIGTERM in any case"),
    "callbacks[CheckpointMonitor].remove_redundancy": Inert("every rank writes what it holds"),
    "callbacks[CheckpointMonitor].save_optimizer": Inert("the optimizer's state is always saved"),
    # model
    "model.model_config.batch_size": Inert("runner_config.batch_size and predict_batch_size say it"),
    "model.model_config.checkpoint_name_or_path": Inert("weights come from load_checkpoint"),
    "model.model_config.use_past": Inert(_DECODE),
    "model.model_config.is_dynamic": Inert(_DECODE),
    "model.model_config.block_size": Inert(_DECODE),
    "model.model_config.num_blocks": Inert(_DECODE),
    "model.model_config.use_rope_slice": Inert(_ASCEND_GRAPH),
    "model.model_config.use_attn_mask_compression": Inert(_ASCEND_GRAPH),
    "model.model_config.use_ring_attention": Inert("a sequence is not shared between ranks", _OFF),
    "model.model_config.parallel_optimizer": Inert("parallel.enable_parallel_optimizer says it"),
    "model.model_config.fine_grain_interleave": Inert(_ASCEND_GRAPH),
    "model.model_config.fused_rms_norm": Inert("the fused kernel is used where there is one"),
    "model.model_config.quant_config": Inert("weights are not quantized", (None,)),
    "model.model_config.llm_backend": Inert("there is one backend"),
    "model.model_config.return_dict_in_generate": Inert("generation writes text"),
    "model.model_config.output_scores": Inert("generation writes text"),
    "model.model_config.output_logits": Inert("generation writes text"),
    "model.model_config.auto_map": Inert("code is loaded from --register_path on the command line only"),
    "model.model_config.trust_remote_code": Inert("code is loaded from --register_path on the command line only"),
}

for _name in (
    "learning_rate origin_epochs dataset_size micro_batch_num micro_batch_interleave_num initial_epoch initial_step "
    "global_batch_size gradient_accumulation_steps device_num"
).split():
    INERT[f"callbacks[MFLossMonitor].{_name}"] = Inert(_RUNTIME)

for _name in ("train_dataset", "eval_dataset"):
    INERT |= {
        f"{_name}.data_loader.dataset_files": Inert("give a file or a folder as dataset_dir", (None, [])),
        f"{_name}.data_loader.columns_list": Inert("input_columns says it"),
        f"{_name}.data_loader.num_parallel_workers": Inert(_LOADER),
        f"{_name}.tokenizer": Inert("the records hold ids already"),
        f"{_name}.output_columns": Inert("input_columns says it"),
        f"{_name}.batch_size": Inert("runner_config.batch_size wins, here as in MindFormers"),
        f"{_name}.repeat": Inert("epochs say it", (None, 1)),
        f"{_name}.num_parallel_workers": Inert(_LOADER),
        f"{_name}.python_multiprocessing": Inert(_LOADER),
        f"{_name}.numa_enable": Inert(_LOADER),
        f"{_name}.prefetch_size": Inert(_LOADER),
        f"{_name}.eod_reset": Inert("documents in a record see each other", _OFF),
        f"{_name}.eod_token_id": Inert("works with eod_reset only"),
        f"{_name}.dynamic_batch": Inert("shapes are static", _OFF),
        f"{_name}.divisor": Inert("works with dynamic_batch only"),
        f"{_name}.remainder": Inert("works with dynamic_batch only"),
        f"{_name}.pad_token_id": Inert("model.model_config.pad_token_id says it"),
        f"{_name}.profile": Inert(_LOADER, _OFF),
        f"{_name}.auto_tune": Inert(_LOADER),
        f"{_name}.filepath_prefix": Inert("works with auto_tune only"),
        f"{_name}.autotune_per_step": Inert("works with auto_tune only"),
    }


def inert_entry(path: str) -> Inert | None:
    """The entry for a key's path (items of lists written by type), or None."""
    return INERT.get(path) or INERT.get(f"{path.rpartition('.')[0]}.*")


def is_inert_section(path: str) -> bool:
    """Whether some keys below `path` are in the table while the section itself is unknown to the schema."""
    return f"{path}.*" in INERT
