"""Every shipped run, merged, against the values of MindFormers' file of that name."""

from __future__ import annotations

import re

import pytest

from llm_core.config import catalog, load_config
from llm_core.config.tree import find, plain

# Keys that all of MindFormers' Llama 2 training files share.
TRAINING = {
    "seed": 0,
    "output_dir": "./output",
    "resume_training": False,
    "do_eval": False,
    "use_parallel": True,
    "trainer.type": "CausalLanguageModelingTrainer",
    "runner_config.sink_mode": True,
    "optimizer.type": "FP32StateAdamWeightDecay",
    "optimizer.beta1": 0.9,
    "optimizer.eps": 1e-8,
    "lr_schedule.type": "CosineWithWarmUpLR",
    "lr_schedule.warmup_ratio": 0.03,
    "lr_schedule.total_steps": -1,
    "train_dataset.data_loader.type": "MindDataset",
    "train_dataset.data_loader.dataset_dir": "",
    "train_dataset.data_loader.shuffle": True,
    "train_dataset.drop_remainder": True,
    "eval_dataset.data_loader.type": "MindDataset",
    "eval_dataset.data_loader.shuffle": False,
    "eval_dataset.drop_remainder": False,
    "parallel.parallel_mode": 1,
    "parallel.gradients_mean": False,
    "parallel.enable_alltoall": False,
    "parallel.full_batch": True,
    "parallel.search_mode": "sharding_propagation",
    "parallel.enable_parallel_optimizer": True,
    "parallel.strategy_ckpt_save_file": "./ckpt_strategy.ckpt",
    "parallel.parallel_optimizer_config.gradient_accumulation_shard": False,
    "parallel.parallel_optimizer_config.parallel_optimizer_threshold": 64,
    "parallel_config.gradient_aggregation_group": 4,
    "recompute_config.select_recompute": False,
    "context.mode": 0,
    "context.device_target": "Ascend",
    "context.max_call_depth": 10000,
    "context.save_graphs": False,
    "context.save_graphs_path": "./graph",
    "context.device_id": 0,
    "runner_wrapper.type": "MFTrainOneStepCell",
    "runner_wrapper.use_clip_grad": True,
    "metric.type": "PerplexityMetric",
    "profile": False,
    "profile_start_step": 1,
    "profile_stop_step": 10,
}
MODEL = {
    "model.arch.type": "LlamaForCausalLM",
    "model.model_config.type": "LlamaConfig",
    "model.model_config.seq_length": 4096,
    "model.model_config.vocab_size": 32000,
    "model.model_config.multiple_of": 256,
    "model.model_config.rms_norm_eps": 1e-5,
    "model.model_config.bos_token_id": 1,
    "model.model_config.eos_token_id": 2,
    "model.model_config.pad_token_id": 0,
    "model.model_config.ignore_token_id": -100,
    "model.model_config.layernorm_compute_type": "float32",
    "model.model_config.softmax_compute_type": "float16",
    "model.model_config.extend_method": "None",
    "model.model_config.scaling_factor": 1.0,
    "model.model_config.use_flash_attention": True,
    "model.model_config.repetition_penalty": 1,
    "model.model_config.max_decode_length": 512,
    "model.model_config.top_k": 3,
    "model.model_config.top_p": 1,
    "model.model_config.do_sample": False,
    "processor.type": "LlamaProcessor",
    "processor.tokenizer.type": "LlamaTokenizer",
}
SIZES = {
    "7b": {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "n_kv_heads": None, "ffn_dim_multiplier": None},
    "13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40, "n_kv_heads": None, "ffn_dim_multiplier": None},
    "70b": {"hidden_size": 8192, "num_layers": 80, "num_heads": 64, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3},
}
DP8 = {
    "parallel_config.data_parallel": 8,
    "parallel_config.model_parallel": 1,
    "parallel_config.pipeline_stage": 1,
    "parallel_config.use_seq_parallel": False,
    "parallel_config.micro_batch_num": 1,
    "parallel_config.vocab_emb_dp": True,
}
PP8 = {
    "parallel_config.data_parallel": 2,
    "parallel_config.model_parallel": 4,
    "parallel_config.pipeline_stage": 8,
    "parallel_config.use_seq_parallel": True,
    "parallel_config.micro_batch_num": 128,
    "parallel_config.vocab_emb_dp": False,
}
DYNAMIC = {
    "runner_wrapper.scale_sense.type": "DynamicLossScaleUpdateCell",
    "runner_wrapper.scale_sense.scale_factor": 2,
    "runner_wrapper.scale_sense.scale_window": 1000,
}
FP16 = {f"model.model_config.{name}": "float16" for name in ("compute_dtype", "rotary_dtype", "param_init_type")}
LARGE = {
    "eval_step_interval": -1,
    "eval_epoch_interval": 50,
    "context.jit_config.jit_level": "O1",
    "context.memory_optimize_level": "O0",
    "model.model_config.qkv_concat": False,
}
BF16 = {
    "runner_config.sink_size": 1,
    "context.max_device_memory": "59GB",
    "context.mempool_block_size": "59GB",
    "context.jit_config.jit_level": "O1",
    "context.memory_optimize_level": "O0",
    "model.model_config.compute_dtype": "bfloat16",
    "model.model_config.rotary_dtype": "float32",
    "model.model_config.embedding_init_type": "bfloat16",
    "runner_wrapper.scale_sense": 1.0,
}


def training(
    size: str,
    mode: str,
    *,
    lr: float,
    lr_end: float,
    epochs: int,
    batch: int,
    accumulation: int | None,
    beta2: float,
    load: str,
    columns: list[str],
    layout: dict,
    scale: int,
    recompute: bool,
    memory: str,
    prefix: str,
    save_steps: int,
    sink_size: int = 2,
    **extra: object,
) -> dict:
    """The values of one training file of the tables, by dotted path."""
    return {
        **TRAINING,
        **MODEL,
        **layout,
        **DYNAMIC,
        **FP16,
        **{f"model.model_config.{name}": value for name, value in SIZES[size].items()},
        "run_mode": mode,
        "load_checkpoint": load,
        "trainer.model_name": f"llama2_{size}",
        "optimizer.learning_rate": lr,
        "optimizer.beta2": beta2,
        "lr_schedule.learning_rate": lr,
        "lr_schedule.lr_end": lr_end,
        "runner_config.epochs": epochs,
        "runner_config.batch_size": batch,
        "runner_config.sink_size": sink_size,
        "runner_config.gradient_accumulation_steps": accumulation,
        "train_dataset.input_columns": columns,
        "runner_wrapper.scale_sense.loss_scale_value": scale,
        "recompute_config.recompute": recompute,
        "context.max_device_memory": memory,
        "callbacks.0.type": "MFLossMonitor",
        "callbacks.1.type": "CheckpointMonitor",
        "callbacks.1.prefix": prefix,
        "callbacks.1.save_checkpoint_steps": save_steps,
        **extra,
    }


IDS, BOTH = ["input_ids"], ["input_ids", "labels"]

EXPECTED: dict[str, dict] = {
    "pretrain_llama2_7b": training(
        "7b",
        "train",
        lr=5e-5,
        lr_end=0,
        epochs=2,
        batch=1,
        accumulation=8,
        beta2=0.95,
        load="",
        columns=IDS,
        layout=DP8,
        scale=65536,
        recompute=False,
        memory="58GB",
        prefix="llama2_7b",
        save_steps=100,
    ),
    "pretrain_llama2_13b": training(
        "13b",
        "train",
        lr=1e-4,
        lr_end=1e-5,
        epochs=2,
        batch=2,
        accumulation=None,
        beta2=0.95,
        load="",
        columns=IDS,
        layout=DP8,
        scale=4294967296,
        recompute=True,
        memory="58GB",
        prefix="llama2_13b",
        save_steps=100,
    ),
    "pretrain_llama2_70b": training(
        "70b",
        "train",
        lr=1e-5,
        lr_end=0,
        epochs=3,
        batch=1,
        accumulation=None,
        beta2=0.95,
        load="",
        columns=IDS,
        layout=PP8,
        scale=65536,
        recompute=False,
        memory="56GB",
        prefix="llama_70b",
        save_steps=1000,
        **LARGE,
    ),
    "finetune_llama2_7b": training(
        "7b",
        "finetune",
        lr=1e-6,
        lr_end=0,
        epochs=2,
        batch=1,
        accumulation=None,
        beta2=0.999,
        load="{path}/llama2_7b.ckpt",
        columns=BOTH,
        layout=DP8,
        scale=65536,
        recompute=False,
        memory="58GB",
        prefix="llama2_7b",
        save_steps=100,
        **{"model.model_config.compute_dtype": "bfloat16", "model.model_config.param_init_type": "float32"},
    ),
    "finetune_llama2_13b": training(
        "13b",
        "finetune",
        lr=1e-5,
        lr_end=0,
        epochs=2,
        batch=4,
        accumulation=None,
        beta2=0.95,
        load="{path}/llama2_13b.ckpt",
        columns=BOTH,
        layout=DP8,
        scale=4294967296,
        recompute=True,
        memory="58GB",
        prefix="llama2_13b",
        save_steps=100,
        **{"eval_dataset.input_columns": BOTH},
    ),
    "finetune_llama2_70b": training(
        "70b",
        "finetune",
        lr=1e-5,
        lr_end=0,
        epochs=2,
        batch=1,
        accumulation=None,
        beta2=0.99,
        load="",
        columns=IDS,
        layout=PP8,
        scale=65536,
        recompute=False,
        memory="54GB",
        prefix="llama_70b",
        save_steps=1000,
        **LARGE,
    ),
}


def without_scale(values: dict) -> dict:
    return {path: value for path, value in values.items() if not path.startswith("runner_wrapper.scale_sense.")}


def in_bf16(values: dict, **extra: object) -> dict:
    return {**without_scale(values), **BF16, **extra}


PP4 = {"parallel_config.pipeline_stage": 4, "recompute_config.recompute": True}
LORA = {
    "model.model_config.max_position_embedding": 4096,
    "model.model_config.pet_config.pet_type": "lora",
    "model.model_config.pet_config.lora_alpha": 16,
    "model.model_config.pet_config.lora_dropout": 0.05,
}
EXPECTED["lora_llama2_7b"] = without_scale(
    training(
        "7b",
        "finetune",
        lr=1e-5,
        lr_end=0,
        epochs=2,
        batch=2,
        accumulation=None,
        beta2=0.999,
        load="",
        columns=BOTH,
        layout=DP8,
        scale=65536,
        recompute=False,
        memory="59GB",
        prefix="llama_7b_lora",
        save_steps=100,
        **LORA,
        **{
            "trainer.model_name": "llama2_7b_lora",
            "runner_wrapper.scale_sense": 1.0,
            "parallel_config.micro_batch_num": 64,
            "model.model_config.compute_dtype": "bfloat16",
            "model.model_config.softmax_compute_type": "float32",
            "model.model_config.param_init_type": "float32",
            "model.model_config.pet_config.lora_rank": 16,
            "model.model_config.pet_config.target_modules": ".*wq|.*wk|.*wv|.*wo",
        },
    )
)
EXPECTED["lora_llama2_13b"] = training(
    "13b",
    "train",
    lr=1e-5,
    lr_end=0,
    epochs=2,
    batch=4,
    accumulation=None,
    beta2=0.95,
    load="",
    columns=BOTH,
    layout=DP8,
    scale=4294967296,
    recompute=True,
    memory="58GB",
    prefix="llama_13b",
    save_steps=100,
    **LORA,
    **{
        "optimizer.learning_rate": None,
        "eval_dataset.input_columns": BOTH,
        "parallel_config.micro_batch_num": 16,
        "model.model_config.pet_config.lora_rank": 8,
        "model.model_config.pet_config.target_modules": ".*wq|.*wv",
    },
)
EXPECTED["finetune_llama2_7b_prefixtuning"] = training(
    "7b",
    "finetune",
    lr=5e-5,
    lr_end=0,
    epochs=10,
    batch=2,
    accumulation=None,
    beta2=0.999,
    load="/llama_7b.ckpt",
    columns=BOTH,
    layout=DP8,
    scale=65536,
    recompute=False,
    memory="58GB",
    prefix="prefixtuning_llama2_7b",
    save_steps=10000,
    **{
        "train_dataset.data_loader.shuffle": False,
        "model.model_config.seq_length": 512,
        "model.model_config.compute_dtype": "bfloat16",
        "model.model_config.softmax_compute_type": "float32",
        "model.model_config.rotary_dtype": "float32",
        "model.model_config.param_init_type": "float32",
        "model.model_config.pet_config.pet_type": "prefixtuning",
        "model.model_config.pet_config.prefix_token_num": 16,
        "model.model_config.pet_config.mid_dim": 512,
        "model.model_config.pet_config.dropout_rate": 0.01,
    },
)
EXPECTED |= {
    "pretrain_llama2_7b_bf16": in_bf16(
        EXPECTED["pretrain_llama2_7b"], **{"optimizer.learning_rate": None, "lr_schedule.learning_rate": 1e-5}
    ),
    "pretrain_llama2_13b_bf16": in_bf16(EXPECTED["pretrain_llama2_13b"]),
    "pretrain_llama2_70b_bf16_64p": in_bf16(EXPECTED["pretrain_llama2_70b"]),
    "pretrain_llama2_70b_bf16_32p": in_bf16(EXPECTED["pretrain_llama2_70b"], **PP4),
    "finetune_llama2_7b_bf16": in_bf16(EXPECTED["finetune_llama2_7b"]),
    "finetune_llama2_13b_bf16": in_bf16(EXPECTED["finetune_llama2_13b"]),
    "finetune_llama2_70b_bf16_64p": in_bf16(EXPECTED["finetune_llama2_70b"]),
    "finetune_llama2_70b_bf16_32p": in_bf16(EXPECTED["finetune_llama2_70b"], **PP4),
}

PREDICT = {
    **MODEL,
    **FP16,
    **DP8,
    "run_mode": "predict",
    "load_checkpoint": "",
    "metric.type": "EmF1Metric",
    "optimizer": None,
    "lr_schedule": None,
    "parallel.enable_parallel_optimizer": False,
    "model.model_config.softmax_compute_type": "float32",
    "model.model_config.qkv_concat": False,
    "context.max_device_memory": "58GB",
}
LARGE_PREDICT = {
    "use_parallel": True,
    "context.ascend_config.precision_mode": "must_keep_origin_dtype",
    "model.model_config.max_position_embedding": 4096,
}
EXPECTED |= {
    "predict_llama2_7b": {
        **PREDICT,
        **{f"model.model_config.{k}": v for k, v in SIZES["7b"].items()},
        "use_parallel": False,
        "trainer.model_name": "llama2_7b",
    },
    "predict_llama2_13b": {
        **PREDICT,
        **LARGE_PREDICT,
        **{f"model.model_config.{k}": v for k, v in SIZES["13b"].items()},
        "trainer.model_name": "llama2_13b",
        "parallel_config.micro_batch_num": 16,
    },
    "predict_llama2_70b": {
        **PREDICT,
        **LARGE_PREDICT,
        **{f"model.model_config.{k}": v for k, v in SIZES["70b"].items()},
        "trainer.model_name": "llama2_70b",
        "parallel_config.data_parallel": 1,
        "parallel_config.model_parallel": 8,
        "eval_step_interval": -1,
        "eval_epoch_interval": 50,
        "model.model_config.layernorm_compute_type": "float16",
        "model.model_config.softmax_compute_type": "float16",
    },
}


def test_the_table_covers_every_llama2_run() -> None:
    assert {name.rpartition("/")[2] for name in catalog.names("^llama2/")} == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_values(name: str) -> None:
    loaded = load_config(name)
    wrong = {}
    for path, expected in EXPECTED[name].items():
        node = find(loaded.tree, path)
        value = None if node is None else plain(node)
        if value != expected:
            wrong[path] = (value, expected)
    assert not wrong


@pytest.mark.parametrize("name", catalog.names())
def test_form(name: str) -> None:
    """Small, explained, with a command that names itself; nothing in it is without meaning."""
    text = (catalog.configs_root() / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 40
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert re.search(rf"run_llm.py --config configs/{re.escape(name)}.yaml", header)
    assert load_config(name).inert == {}


@pytest.mark.parametrize("name", catalog.names("^demo/"))
def test_demo_runs_anywhere(name: str) -> None:
    loaded = load_config(
        name,
        [
            ("train_dataset.data_loader.dataset_dir", "x"),
            ("eval_dataset.data_loader.dataset_dir", "y"),
            ("predict_data", "hello"),
        ],
    )
    loaded.require_runnable()
    assert loaded.notes == []


def test_every_layer_is_used_by_a_run() -> None:
    from llm_core.config.catalog import _layers_of

    root = catalog.configs_root()
    used = {layer for name in catalog.names() for layer in _layers_of(root / f"{name}.yaml")}
    unused = {path for path in root.rglob("*.yaml") if path.parent.name in ("base", "model", "parallel")} - used
    assert not unused
