"""Layers, overrides, and every way in which a run file can be wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_core.config import load_config
from llm_core.errors import UserError

MODEL = """\
model:
  arch: {type: LlamaForCausalLM}
  model_config:
    type: LlamaConfig
    hidden_size: 64
    num_heads: 4
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def problems(path: Path, *overrides: tuple, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, **options)
    return str(caught.value)


# ---- layers ----


def test_layers_merge_in_order(write) -> None:
    write(MODEL + "seed: 1\nrunner_config: {epochs: 1, batch_size: 2}\n", "base/a.yaml")
    write("seed: 2\nrunner_config: {epochs: 3}\n", "base/b.yaml")
    path = write("base_config: [base/a.yaml, base/b.yaml]\nrunner_config:\n  sink_size: 4\n")
    loaded = load_config(path)
    runner = loaded.config.runner_config
    assert (loaded.config.seed, runner.epochs, runner.batch_size, runner.sink_size) == (2, 3, 2, 4)
    assert loaded.origins["seed"].endswith("base/b.yaml:1")
    assert loaded.origins["runner_config.batch_size"].endswith("base/a.yaml:8")
    assert loaded.origins["runner_config.sink_size"].endswith("run.yaml:3")
    assert loaded.origins["runner_config.gradient_accumulation_steps"] == "default"


def test_a_layer_of_a_layer_is_relative_to_its_own_file(write) -> None:
    write(MODEL + "seed: 5\n", "deep/er/base.yaml")
    write("base_config: er/base.yaml\n", "deep/middle.yaml")
    assert load_config(write("base_config: deep/middle.yaml\n")).config.seed == 5


def test_lists_are_replaced(write) -> None:
    write(MODEL + "callbacks:\n  - type: MFLossMonitor\n  - type: CheckpointMonitor\n", "base.yaml")
    config = load_config(write("base_config: base.yaml\ncallbacks:\n  - type: MFLossMonitor\n")).config
    assert [each.type for each in config.callbacks] == ["MFLossMonitor"]


def test_another_type_drops_the_keys_of_the_former(write) -> None:
    write(MODEL + "optimizer: {type: FP32StateAdamWeightDecay, beta1: 0.8, weight_decay: 0.1}\n", "base.yaml")
    path = write("base_config: base.yaml\noptimizer: {type: AdamW}\n")
    optimizer = load_config(path).config.optimizer
    assert optimizer.type == "AdamW" and optimizer.weight_decay == 0.1 and optimizer.betas == (0.9, 0.999)
    # ... but in one file the mixture is a mistake
    mixed = write(MODEL + "optimizer: {type: AdamW, beta1: 0.8}\n", "mixed.yaml")
    assert "optimizer.beta1: unknown key; did you mean optimizer.betas?" in problems(mixed)


def test_null_takes_a_section_away(write) -> None:
    write(MODEL + "lr_schedule: {type: cosine, learning_rate: 1.e-3}\n", "base.yaml")
    assert load_config(write("base_config: base.yaml\nlr_schedule: null\n")).config.lr_schedule is None


def test_cycle_of_layers(write) -> None:
    write("base_config: run.yaml\n", "other.yaml")
    message = problems(write("base_config: other.yaml\n"))
    assert "other.yaml:1: base_config: the files stand on each other" in message and "->" in message


def test_missing_layer(write) -> None:
    assert re.search(
        r"run.yaml:1: base_config: .*nowhere.yaml: no such file", problems(write("base_config: nowhere.yaml\n"))
    )


# ---- YAML ----


def test_anchors_and_merge_keys(write) -> None:
    path = write(
        MODEL
        + "train_dataset: &data\n  data_loader: &loader {dataset_dir: a, shuffle: True}\n  input_columns: [input_ids]\n"
        "eval_dataset:\n  <<: *data\n  data_loader: {<<: *loader, shuffle: False}\n"
    )
    config = load_config(path).config
    assert config.eval_dataset.data_loader.dataset_dir == "a"
    assert config.train_dataset.data_loader.shuffle and not config.eval_dataset.data_loader.shuffle


@pytest.mark.parametrize("text", ["1e-5", "1.e-5", "1E-5", "0.00001", '"1e-5"'])
def test_floats_as_people_write_them(text: str, write) -> None:
    path = write(MODEL + f"optimizer: {{type: AdamW, learning_rate: {text}}}\n")
    assert load_config(path).config.optimizer.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "run.yaml:1: .*this one is a list"),
        ("", "this one is empty"),
        ("just words\n", "this one is a single value"),
        (
            MODEL + "seed: 1\nrun_mode: train\nseed: 2\n",
            r"run.yaml:9: seed: duplicate key, first given at .*run.yaml:7",
        ),
        (
            MODEL + "seed: !!python/object/apply:os.system [ls]\n",
            "run.yaml:7: the tag .*python/object.* is not allowed",
        ),
        (MODEL + "seed: !custom 3\n", "run.yaml:7: the tag !custom is not allowed"),
        ("model: [1, 2\nseed: 1\n", r"run.yaml:2: not valid YAML"),
        ("model:\n\tarch: x\n", "run.yaml:2: not valid YAML"),
        ("a: &x [*x]\n", "run.yaml:1: .*(alias|anchor|found)"),
        ("seed: 1\n---\nseed: 2\n", "run.yaml:2: not valid YAML"),
        (MODEL + "? [a, b]\n: 1\n", "run.yaml:7: a key must be a word"),
        ("seed: \x01\n", "run.yaml:1: not valid YAML"),
    ],
)
def test_bad_yaml(text: str, said: str, write) -> None:
    assert re.search(said, problems(write(text)))


def test_alias_flood_is_stopped(write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "more than" in problems(write("\n".join(lines)))


@pytest.mark.parametrize("text", ["a: " + "[" * 200_000, "a: " + "{a: " * 150 + "1" + "}" * 150, "- " * 5000])
def test_deep_nesting_is_stopped(text: str, write) -> None:
    """The C composer would run out of stack, and take the process with it."""
    assert "run.yaml:1: nested deeper than 100 levels" in problems(write(text))


def test_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"seed: 1\noutput_dir: caf\xe9\n")
    assert "run.yaml:2: not UTF-8" in problems(path)


def test_missing_file(tmp_path: Path) -> None:
    assert "no such file" in problems(tmp_path / "nope.yaml")


# ---- keys and values ----


def test_every_problem_is_reported_with_its_line(write) -> None:
    path = write(
        "sed: 3\n"
        "model:\n"
        "  arch: {type: LlamaForCausalML}\n"
        "  model_config:\n"
        "    type: LlamaConfig\n"
        "    hiden_size: 64\n"
        "    compute_dtype: flot16\n"
        "runner_config:\n"
        "  epochs: many\n"
        "  batch_size: 0\n"
        "  sink_mode: 2\n"
        "callbacks:\n"
        "  - type: CheckpointMonitor\n"
        "    save_steps: 3\n"
        "  - type: LossMonitor\n"
        "lr_schedule:\n"
        "  learning_rate: 1.e-3\n"
    )
    lines = [line.replace(str(path.parent) + "/", "") for line in problems(path).splitlines()]
    heads = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    networks = ", ".join(f"{family}For{head}" for family in ("Llama", "InternLM", "Falcon") for head in heads)
    for expected in (
        "run.yaml:1: sed: unknown key; did you mean seed?",
        f"run.yaml:3: model.arch.type: 'LlamaForCausalML' is none of {networks}; did you mean LlamaForCausalLM?",
        "run.yaml:6: model.model_config.hiden_size: unknown key; did you mean model.model_config.hidden_size?",
        "run.yaml:7: model.model_config.compute_dtype: 'flot16' is none of float32, float16, bfloat16; "
        "did you mean float16?",
        "run.yaml:9: runner_config.epochs: 'many': should be a valid integer, unable to parse string as an integer",
        "run.yaml:10: runner_config.batch_size: 0: should be greater than or equal to 1",
        "run.yaml:11: runner_config.sink_mode: 2: should be a valid boolean, unable to interpret input",
    ):
        assert expected in lines
    rest = [line for line in lines if line.startswith(("run.yaml:14", "run.yaml:15", "run.yaml:16"))]
    assert len(rest) == 3 and len(lines) == 10
    assert "callbacks.0.save_steps: unknown key; did you mean callbacks.0.sample_steps" not in "\n".join(rest)
    assert "callbacks.1.type: 'LossMonitor'" in rest[1] and "did you mean MFLossMonitor?" in rest[1]
    assert "lr_schedule.type: is required; one of ConstantWarmUpLR" in rest[2]


def test_a_key_of_another_section_is_found(write) -> None:
    assert "did you mean runner_config.batch_size?" in problems(write(MODEL + "batch_size: 3\n"))
    assert "did you mean model.model_config.hidden_size?" in problems(
        write(MODEL + "runner_config: {hidden_size: 3}\n")
    )


def test_missing_sections(write) -> None:
    message = problems(write("seed: 1\n"))
    assert "model: is required" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("model.model_config.num_heads", "3"), "hidden_size 64 is no multiple of num_heads 3"),
        (("model.model_config.n_kv_heads", "3"), "num_heads 4 is no multiple of n_kv_heads 3"),
        (("model.model_config.head_dim", "5"), "even width"),
        (("model.model_config.pad_token_id", "-2"), "greater than or equal to -1"),
        (("model.model_config.type", "FalconConfig"), "does not go with"),
        (("runner_config.epochs", "True"), "True is no whole number"),
        (("runner_config.epochs", "1.5"), "whole|integer"),
        (("model.model_config.theta", ".nan"), "finite"),
        (("runner_config.sink_size", "0"), "cannot be 0"),
        (("model.model_config", "7"), "model.model_config"),
        (("context.max_device_memory", "58"), "context.max_device_memory"),
    ],
)
def test_values_that_do_not_fit(change: tuple[str, str], said: str, write) -> None:
    message = problems(write(MODEL), change)
    assert re.search(said, message)
    assert message.startswith(f"--{change[0]}: ")


def test_pad_token_may_be_minus_one(write) -> None:
    assert load_config(write(MODEL + "    pad_token_id: -1\n")).config.model.config.pad_token_id == -1


def test_the_config_is_frozen(write) -> None:
    config = load_config(write(MODEL)).config
    with pytest.raises(ValueError):
        config.runner_config.epochs = 3


# ---- overrides ----


def test_overrides_win_and_are_typed(write) -> None:
    path = write(MODEL + "seed: 1\ncallbacks:\n  - type: MFLossMonitor\n  - type: CheckpointMonitor\n    prefix: a\n")
    loaded = load_config(
        path,
        [
            ("seed", "7"),
            ("output_dir", "2024"),
            ("do_eval", "true"),
            ("resume_training", "run_rank_0-1_5.safetensors"),
            ("callbacks[CheckpointMonitor].prefix", "007"),
            ("callbacks.0.per_print_times", "3"),
            ("callbacks[SampleMonitor].prompts", "[hello, 'a, b']"),
            ("runner_wrapper.scale_sense", "1e3"),
            ("lr_schedule", "{type: cosine, learning_rate: 1e-4}"),
            ("model.model_config.stop_strings", '["\\n\\n"]'),
            ("eval_step_interval", "-1"),
            ("load_checkpoint", "None"),
        ],
    )
    config = loaded.config
    assert config.seed == 7 and config.output_dir == "2024" and config.do_eval is True
    assert config.resume_training == "run_rank_0-1_5.safetensors"
    assert [each.type for each in config.callbacks] == ["MFLossMonitor", "CheckpointMonitor", "SampleMonitor"]
    assert config.callbacks[0].per_print_times == 3 and config.callbacks[1].prefix == "007"
    assert config.callbacks[2].prompts == ["hello", "a, b"]
    assert config.runner_wrapper.scale_sense == 1000 and config.lr_schedule.learning_rate == 1e-4
    assert config.model.config.stop_strings == ["\n\n"] and config.eval_step_interval == -1
    assert (
        loaded.origins["seed"] == "--seed"
        and loaded.origins["callbacks.1.prefix"] == "--callbacks[CheckpointMonitor].prefix"
    )


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("1", True), ("false", False), ("False", False), ("0", False)]
)
def test_truth_values(text: str, value: bool, write) -> None:
    assert load_config(write(MODEL), [("use_parallel", text)]).config.use_parallel is value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("epoch", "1"), "--epoch: unknown flag; did you mean --epochs?"),
        (("sead", "1"), "--sead: unknown flag; did you mean --seed?"),
        (("model.model_config.hiden_size", "1"),
         "--model.model_config.hiden_size: unknown key; did you mean model.model_config.hidden_size?"),
        (("callbacks[CheckpointMoniter].prefix", "x"), "did you mean callbacks[CheckpointMonitor]?"),
        (("callbacks.4.prefix", "x"), "callbacks has 0 items"),
        (("seed.x", "1"), "seed is a single value"),
        (("a..b", "1"), "not a key"),
    ],
)  # fmt: skip
def test_bad_overrides(change: tuple[str, str], said: str, write) -> None:
    assert said in problems(write(MODEL + "seed: 1\ncallbacks: []\n"), change, flags=["--epochs", "--seed"])


# ---- written again ----


def test_as_yaml_loads_to_the_same_run(write, tmp_path: Path) -> None:
    path = write(
        MODEL + "output_dir: 'it''s: #1'\n"
        "predict_data: ['yes', '1e-5', 'a, b', '[x]', \"new\\nline\", 'null', '  ', '-', 'é']\n"
        "optimizer: {type: AdamW, learning_rate: 1e-5}\nrunner_config: {epochs: 1_000}\n"
        "callbacks:\n  - type: MFLossMonitor\n  - {type: SampleMonitor, prompts: []}\n"
    )
    loaded = load_config(path, [("callbacks.1.prompts", "[a]")])
    for options in ({}, {"origins": True}, {"defaults": True}):
        again = load_config(write(loaded.as_yaml(**options), "again.yaml"))
        assert again.config == loaded.config, options


def test_show_cfg_tells_where_values_come_from(write) -> None:
    loaded = load_config(write(MODEL), [("seed", "3")])
    text = loaded.as_yaml(origins=True, defaults=True)
    assert re.search(r"^seed: 3 +# --seed$", text, re.M)
    assert re.search(r"^    hidden_size: 64 +# .*run.yaml:5$", text, re.M)
    assert re.search(r"^  epochs: 1 +# default$", text, re.M)
