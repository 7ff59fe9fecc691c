"""The shipped runs of Falcon and InternLM: the published sizes, and for InternLM the values of MindFormers' files."""

from __future__ import annotations

import pytest

from llm_core.config import catalog, load_config
from llm_core.config.tree import find, plain
from llm_core.models.spec import spec_from_config

# Parameters of the published weights, a tied head counted once.
PUBLISHED = {
    "falcon_rw_1b": 1_311_625_216,
    "falcon_7b": 6_921_720_704,
    "falcon_40b": 41_303_293_952,
    "internlm_7b": 7_321_948_160,
    "internlm_20b": 20_088_714_240,
}

INTERNLM = {
    "seed": 0,
    "trainer.model_name": "internlm_7b",
    "parallel_config.data_parallel": 8,
    "parallel_config.model_parallel": 1,
    "parallel_config.micro_batch_num": 1,
    "context.max_device_memory": "59GB",
    "model.arch.type": "InternLMForCausalLM",
    "model.model_config.type": "InternLMConfig",
    "model.model_config.seq_length": 2048,
    "model.model_config.vocab_size": 103168,
    "model.model_config.rms_norm_eps": 1e-6,
    "model.model_config.pad_token_id": 2,
    "model.model_config.compute_dtype": "float16",
    "model.model_config.rotary_dtype": "float16",
    "model.model_config.param_init_type": "float16",
    "model.model_config.has_bias": True,
    "model.model_config.use_flash_attention": True,
    "model.model_config.repetition_penalty": 1.0,
    "model.model_config.max_decode_length": 512,
    "model.model_config.top_k": 3,
    "model.model_config.top_p": 0.8,
    "model.model_config.do_sample": False,
    "processor.tokenizer.type": "InternLMTokenizer",
    "metric.type": "PerplexityMetric",
}
EXPECTED = {
    "finetune_internlm_7b": {
        **INTERNLM,
        "run_mode": "finetune",
        "load_checkpoint": "./internlm.ckpt",
        "use_parallel": True,
        "runner_config.sink_mode": True,
        "runner_config.epochs": 1,
        "runner_config.batch_size": 2,
        "optimizer.type": "FP32StateAdamWeightDecay",
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.1,
        "lr_schedule.type": "CosineWithWarmUpLR",
        "lr_schedule.learning_rate": 1e-5,
        "lr_schedule.warmup_ratio": 0.03,
        "lr_schedule.total_steps": -1,
        "train_dataset.input_columns": ["input_ids", "labels"],
        "eval_step_interval": -1,
        "eval_epoch_interval": 50,
        "parallel.enable_parallel_optimizer": True,
        "parallel_config.vocab_emb_dp": False,
        "recompute_config.recompute": False,
        "callbacks.1.prefix": "internlm_7b",
        "callbacks.1.save_checkpoint_steps": 500,
        "callbacks.1.keep_checkpoint_max": 3,
        "context.jit_config.jit_level": "O2",
        "model.model_config.layernorm_compute_type": "float32",
        "model.model_config.softmax_compute_type": "float32",
        "runner_wrapper.type": "MFTrainOneStepCell",
        "runner_wrapper.scale_sense.type": "DynamicLossScaleUpdateCell",
        "runner_wrapper.scale_sense.loss_scale_value": 16384,
    },
    "predict_internlm_7b": {
        **INTERNLM,
        "run_mode": "predict",
        "use_parallel": False,
        "parallel.enable_parallel_optimizer": False,
        "parallel_config.data_parallel": 1,
        "parallel_config.model_parallel": 8,
        "model.model_config.layernorm_compute_type": "float16",
        "model.model_config.softmax_compute_type": "float16",
    },
}

EXPECTED |= {
    "finetune_internlm_7b_lora_mmlu": {
        **EXPECTED["finetune_internlm_7b"],
        "trainer.model_name": "internlm_7b_lora",
        "runner_config.batch_size": 4,
        "optimizer.weight_decay": 0.01,
        "lr_schedule.learning_rate": 5e-5,
        "parallel_config.vocab_emb_dp": True,
        "recompute_config.recompute": True,
        "callbacks.1.prefix": "internlm_7b_lora",
        "model.model_config.use_flash_attention": False,
        "model.model_config.repetition_penalty": 1.02,
        "model.model_config.max_decode_length": 100,
        "model.model_config.top_k": 50,
        "model.model_config.top_p": 0.9,
        "model.model_config.do_sample": True,
        "model.model_config.pet_config.pet_type": "lora",
        "model.model_config.pet_config.lora_rank": 8,
        "model.model_config.pet_config.lora_alpha": 16,
        "model.model_config.pet_config.lora_dropout": 0.05,
        "model.model_config.pet_config.target_modules": ".*wq|.*wk|.*wv|.*wo",
    },
    "predict_internlm_7b_mmlu": {**EXPECTED["predict_internlm_7b"], "processor.type": "InternLMProcessor"},
    "predict_internlm_7b_eval_squad": {**EXPECTED["predict_internlm_7b"], "metric.type": "EmF1Metric"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_mindformers(name: str) -> None:
    tree = load_config(name).tree
    wrong = {}
    for path, expected in EXPECTED[name].items():
        node = find(tree, path)
        value = None if node is None else plain(node)
        if value != expected:
            wrong[path] = (value, expected)
    assert not wrong


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    for kind in ("pretrain", "finetune", "predict"):
        spec = spec_from_config(load_config(f"{kind}_{size}").config.model)
        assert spec.num_parameters == PUBLISHED[size]


def test_every_family_has_its_demo() -> None:
    for family in ("llama", "falcon", "internlm"):
        runs = {f"demo/{kind}_{family}_demo" for kind in ("pretrain", "finetune", "predict")}
        assert runs <= set(catalog.names("^demo/"))
