"""MindFormers' own files load unmodified; keys without meaning are listed, values that would mislead are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from mindformers_files import INTERNLM_LORA, LORA_7B, PREDICT_7B, PREFIX_7B, PRETRAIN_7B, PRETRAIN_70B, changed

from llm_core.config import load_config
from llm_core.config.compat import map_to_device
from llm_core.errors import UserError

FILES = {
    "pretrain_7b": PRETRAIN_7B,
    "lora_7b": LORA_7B,
    "prefix_7b": PREFIX_7B,
    "pretrain_70b": PRETRAIN_70B,
    "internlm_lora": INTERNLM_LORA,
    "predict_7b": PREDICT_7B,
}


def load(tmp_path: Path, text: str, *overrides: tuple[str, str]):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("name", FILES)
def test_loads_unmodified(name: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, FILES[name])
    assert {"layer_scale", "auto_tune", "callbacks[ObsMonitor]", "eval_callbacks"} <= set(loaded.inert)
    assert [callback.type for callback in loaded.config.callbacks] == ["MFLossMonitor", "CheckpointMonitor"]
    assert loaded.config.processor.tokenizer.add_bos_token is None  # a tokenizer.model begins a text with bos


def test_values_arrive_under_their_names(tmp_path: Path) -> None:
    config = load(tmp_path, PRETRAIN_7B).config
    assert config.optimizer.eps == 1e-8 and config.lr_schedule.warmup_ratio == 0.03
    assert config.model.config.hidden_size == 4096 and config.model.arch.type == "LlamaForCausalLM"
    assert config.train_dataset.data_loader.shuffle and not config.eval_dataset.data_loader.shuffle
    assert config.runner_wrapper.scale_sense.loss_scale_value == 65536
    assert config.callbacks[1].prefix == "llama2_7b"
    assert [metric.type for metric in config.metric] == ["PerplexityMetric"]


def test_tuning_sections_are_told_apart_by_type(tmp_path: Path) -> None:
    assert load(tmp_path, LORA_7B).config.model.config.pet_config.lora_rank == 16
    assert load(tmp_path, LORA_7B).config.runner_wrapper.scale_sense == 1.0
    assert load(tmp_path, PREFIX_7B).config.model.config.pet_config.prefix_token_num == 16
    internlm = load(tmp_path, INTERNLM_LORA).config.model.config
    assert internlm.type == "InternLMConfig" and internlm.has_bias


def test_one_note_lists_all_keys_without_meaning(tmp_path: Path) -> None:
    loaded = load(tmp_path, PRETRAIN_7B)
    listing = [note for note in loaded.notes if note.startswith("no meaning here")]
    assert len(listing) == 1
    assert "remote_save_url" in listing[0] and "train_dataset.batch_size" in listing[0]
    assert all(loaded.inert.values())


def test_a_gpu_is_mapped_to_the_cpu_whether_there_is_one_or_not(tmp_path: Path) -> None:
    loaded = load(tmp_path, changed(PRETRAIN_7B, ('device_target: "Ascend"', 'device_target: "GPU"')))
    assert loaded.config.context.device_target == "CPU"
    assert [note for note in loaded.notes if "GPU -> CPU" in note and note.endswith(": runs use no GPU")]


def test_ascend_values_are_mapped_on_a_cpu_with_a_line_each(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KERNELS", "plain")
    loaded = load(tmp_path, changed(PRETRAIN_7B, ('compute_dtype: "float16"', 'compute_dtype: "bfloat16"')))
    config = loaded.config
    assert config.context.device_target == "CPU"
    model = config.model.config
    assert (model.compute_dtype, model.rotary_dtype, model.param_init_type) == ("float32", "float32", "float32")
    for part in ("Ascend -> CPU", "float16 -> float32", "compute_dtype: bfloat16 -> float32"):
        assert sum(part in note for note in loaded.notes) >= 1, part
    assert sum("context.max_device_memory" in note for note in loaded.notes) == 1
    assert "compute_dtype: bfloat16" in loaded.as_yaml()  # the file that is kept is the one for the cluster


def test_bfloat16_products_stay_where_the_kernels_have_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KERNELS", "avx512_bf16")
    changes = [("compute_dtype", "bfloat16"), ("param_init_type", "bfloat16")]
    text = changed(PRETRAIN_7B, *((f'{key}: "float16"', f'{key}: "{value}"') for key, value in changes))
    loaded = load(tmp_path, text)
    model = loaded.config.model.config
    assert (model.compute_dtype, model.param_init_type) == ("bfloat16", "float32")
    assert any("param_init_type: bfloat16 -> float32: only products" in note for note in loaded.notes)
    assert not any("compute_dtype" in note for note in loaded.notes)


@pytest.mark.parametrize(("kernels", "noted"), [("plain", 1), ("avx512_bf16", 0)])
def test_an_adapters_bfloat16_products_are_noted_where_there_are_none(tmp_path, monkeypatch, kernels, noted) -> None:
    monkeypatch.setenv("KERNELS", kernels)
    text = (
        "context: {device_target: CPU}\nmodel:\n  arch: {type: LlamaForCausalLM}\n"
        "  model_config: {type: LlamaConfig, compute_dtype: float32,\n"
        "    pet_config: {pet_type: lora, lora_rank: 3, compute_dtype: bfloat16}}\n"
    )
    notes = [note for note in load(tmp_path, text).notes if "pet_config compute_dtype: -> float32 on a CPU" in note]
    assert len(notes) == noted


def test_a_plain_cpu_file_has_no_mapping_notes(tmp_path: Path) -> None:
    text = (
        "context: {device_target: CPU}\nmodel:\n  arch: {type: LlamaForCausalLM}\n"
        "  model_config: {type: LlamaConfig, compute_dtype: float32, param_init_type: float32}\n"
    )
    assert load(tmp_path, text).notes == []


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("layer_scale: False", "layer_scale: False\nlr_scale: True", "lr_scale"),
        ("  batch_size: 6\n  repeat: 1", "  batch_size: 6\n  repeat: 2", "train_dataset.repeat"),
        ("layer_scale: False", "layer_scale: False\nmoe_config: {expert_num: 8}", "moe_config.expert_num"),
        ("    offset: 0", "    quant_config: {quant_method: rtn}", "model.model_config.quant_config"),
    ],
)  # fmt: skip
def test_a_value_that_would_change_the_result_is_refused(old: str, new: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"run.yaml:\d+: {key}: .* is not supported"):
        load(tmp_path, changed(PRETRAIN_7B, (old, new)))


def test_a_task_with_another_dataset_is_refused(tmp_path: Path) -> None:
    text = changed(PRETRAIN_7B, ("dataset_config: *train_dataset", "dataset_config: {data_loader: {dataset_dir: x}}"))
    with pytest.raises(UserError, match="train_dataset_task.dataset_config: differs from train_dataset"):
        load(tmp_path, text)


def test_top_level_top_k_is_the_models(tmp_path: Path) -> None:
    assert load(tmp_path, PREDICT_7B + "top_k: 7\n").config.model.config.top_k == 7


def test_schedule_inside_the_optimizer(tmp_path: Path) -> None:
    start = PRETRAIN_7B.index("lr_schedule:")
    end = PRETRAIN_7B.index("train_dataset:")
    text = changed(
        PRETRAIN_7B[:start] + PRETRAIN_7B[end:],
        (
            "  learning_rate: 5.e-5",
            "  learning_rate: {type: LinearWithWarmUpLR, learning_rate: 2.e-4, warmup_steps: 5}",
        ),
    )
    config = load(tmp_path, text).config
    assert config.lr_schedule.type == "LinearWithWarmUpLR" and config.lr_schedule.learning_rate == 2e-4


def test_auto_map_and_trust_remote_code_run_nothing(tmp_path: Path) -> None:
    text = INTERNLM_LORA.replace("    has_bias: True\n", "    has_bias: True\n    trust_remote_code: True\n")
    loaded = load(tmp_path, text)
    assert "model.model_config.auto_map" in loaded.inert and "model.model_config.trust_remote_code" in loaded.inert
    assert "--register_path" in loaded.inert["model.model_config.auto_map"]


def test_env_is_checked(tmp_path: Path) -> None:
    good = PRETRAIN_7B + "env:\n  HCCL_BUFFSIZE: 200\n  MS_DEV_SIDE_EFFECT_LOAD_ELIM: 3\n"
    loaded = load(tmp_path, good)
    assert loaded.config.env == {"HCCL_BUFFSIZE": "200", "MS_DEV_SIDE_EFFECT_LOAD_ELIM": "3"}
    assert any("env" in note and "Ascend only" in note for note in loaded.notes)
    with pytest.raises(UserError, match="did you mean HCCL_BUFFSIZE"):
        load(tmp_path, PRETRAIN_7B + "env:\n  HCCL_BUFSIZE: 200\n")
    with pytest.raises(UserError, match="LD_PRELOAD is no variable that a run file may set"):
        load(tmp_path, PRETRAIN_7B + "env:\n  LD_PRELOAD: /tmp/evil.so\n")


def test_what_only_several_ranks_or_another_device_would_read_is_named() -> None:
    loaded = load_config("predict_llama2_7b", [("auto_trans_ckpt", "True"), ("context.runtime_num_threads", "3")])
    assert any(note.startswith("auto_trans_ckpt: not needed") for note in loaded.notes)
    assert any("context.runtime_num_threads" in note and "Ascend only" in note for note in loaded.notes)
    _, notes = map_to_device(loaded.config, loaded.tree, "Ascend")
    assert not any("use_flash_attention" in note for note in notes)
    section = loaded.config.model.config.model_copy(update={"compute_dtype": "bfloat16"})
    model = loaded.config.model.model_copy(update={"config": section})
    _, notes = map_to_device(loaded.config.model_copy(update={"model": model}), loaded.tree, "Ascend")
    assert any("compute_dtype" in note and "attention in bfloat16" in note for note in notes)


def test_parallel_speed_up_file_is_checked(tmp_path: Path) -> None:
    speed_up = tmp_path / "parallel_speed_up.json"
    text = changed(PRETRAIN_70B, ("/path/to/your/parallel_speed_up.json", str(speed_up)))
    assert any("does not exist" in note for note in load(tmp_path, text).notes)
    speed_up.write_text('{"enable_grad_comm_opt": true, "compute_communicate_fusion_level": 3}')
    load(tmp_path, text)
    speed_up.write_text('{"enable_grad_com_opt": true, "compute_communicate_fusion_level": "3"}')
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert "did you mean enable_grad_comm_opt" in str(caught.value) and "'3' is not a whole number" in str(caught.value)
    speed_up.write_text('{\n"enable_grad_comm_opt" true}')
    with pytest.raises(UserError, match="parallel_speed_up.json:2: .*not valid JSON"):
        load(tmp_path, text)
