"""Evaluation and prediction on several ranks give what one process gives, and rank 0 alone writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from layout_cases import launch
from safetensors.numpy import save_file

from llm_core.config import load_config
from llm_core.data.records import RecordWriter
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.peft.apply import adapter_shapes
from llm_core.text import load_tokenizer

WIDTH = 24
PROMPTS = ["What is a module?", "", "Who calls it", "Name the exception that open raises for a missing file.", "a b"]
MODEL = {
    "type": "LlamaConfig", "vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2,
    "intermediate_size": 64, "seq_length": WIDTH, "max_position_embedding": 256, "do_sample": False,
    "compute_dtype": "float32", "param_init_type": "float32", "softmax_compute_type": "float32",
    "rotary_dtype": "float32", "max_new_tokens": 6,
}  # fmt: skip
LORA = {"pet_type": "lora", "lora_rank": 2, "lora_alpha": 4, "target_modules": "wq|wv|wo|w1|w2|lm_head"}
RUNS = {
    "measured": {},
    "greedy": {"max_new_tokens": 5},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "pet_config": LORA},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
}


@dataclass(frozen=True)
class Layout:
    """Sizes of a run's layout."""

    dp: int = 1
    tp: int = 1
    pp: int = 1


ONE, REPLICAS, SHARDS, STAGES = Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, spm_model) -> Path:
    """All runs of one process and of two, which begin with a training's settings: ZeRO, sequence parallel."""
    folder = tmp_path_factory.mktemp("ranks")
    write_inputs(folder, spm_model)
    every = {layout: [command(folder, spm_model, name, layout) for name in RUNS] for layout in (ONE, REPLICAS, SHARDS)}
    stages = command(folder, spm_model, "measured", STAGES, metric=[{"type": "PerplexityMetric"}])
    assert launch(folder, 1, every[ONE]) == [[0] * 4]
    assert launch(folder, 2, [*every[REPLICAS], *every[SHARDS], stages]) == [[0] * 9] * 2
    return folder


def output(folder: Path, name: str, layout: Layout) -> Path:
    return folder / f"{name}_{layout.dp}{layout.tp}{layout.pp}"


def command(folder: Path, spm_model: Path, name: str, layout: Layout, **changes) -> list[str]:
    """The command line of a run, whose YAML it writes."""
    out = output(folder, name, layout)
    choice = {"type": "ChoiceMetric", "path": str(folder / "mmlu"), "split": "dev"}
    measured = {
        "run_mode": "eval", "metric": [{"type": "PerplexityMetric"}, {"type": "EmF1Metric"}, choice],
        "eval_dataset": {"data_loader": {"dataset_dir": str(folder / "questions.mindrecord")},
                         "input_columns": ["input_ids"]},
    }  # fmt: skip
    predicted = {"run_mode": "predict", "predict_data": [str(folder / "prompts.jsonl")], "predict_batch_size": 2,
                 "save_file": str(out / "answers.npy")}  # fmt: skip
    config = {
        "seed": 7, "output_dir": str(out), "load_checkpoint": str(folder / "model.safetensors"),
        "runner_config": {"batch_size": 2}, "context": {"device_target": "CPU"},
        "processor": {"tokenizer": {"vocab_file": str(spm_model)}}, "use_parallel": layout != ONE,
        "parallel": {"zero_stage": 3, "parallel_optimizer_config": {"parallel_optimizer_threshold": 0}},
        "parallel_config": {"data_parallel": layout.dp, "model_parallel": layout.tp, "pipeline_stage": layout.pp,
                            "micro_batch_num": layout.pp, "use_seq_parallel": True, "vocab_emb_dp": False},
        "model": {"arch": {"type": "LlamaForCausalLM"}, "model_config": {**MODEL, **RUNS[name]}},
        **(measured if name == "measured" else predicted), **changes,
    }  # fmt: skip
    if "pet_config" in RUNS[name]:
        config["adapter_id"] = str(folder / "adapter.safetensors")
    path = folder / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def write_inputs(folder: Path, spm_model: Path) -> None:
    """Weights, whose next token is never a close call; an adapter; records with questions; choices; prompts."""
    rng = np.random.default_rng(5)
    spec = spec_of(folder)
    weights = {name: rng.standard_normal(shape) * 0.5 for name, shape in parameter_shapes(spec).items()}
    save(folder / "model.safetensors", weights)
    pet = load_config(write_model(folder, pet_config=LORA)).config.model.config.pet_config
    shapes = adapter_shapes(spec, pet)
    save(folder / "adapter.safetensors", {name: rng.standard_normal(shape) * 0.3 for name, shape in shapes.items()})
    tokenizer = load_tokenizer(spm_model)
    rows = {"input_ids": [], "labels": []}
    for text in ("What is it?", "Who calls a", "Name the", "a b c d", "Is it there"):
        rows["input_ids"].append(padded(tokenizer.encode(text, bos=True)))
        rows["labels"].append(padded(tokenizer.encode("a file")))
    with RecordWriter(folder / "questions.mindrecord", columns={"input_ids": WIDTH, "labels": WIDTH}) as writer:
        writer.write_rows({name: np.array(column, np.int32) for name, column in rows.items()})
    (folder / "mmlu/dev").mkdir(parents=True)
    lines = [f"Q{'x' * (3 * n)}?,1,2,3,4,{'ABCD'[n % 4]}\n" for n in range(5)]
    (folder / "mmlu/dev/anatomy_dev.csv").write_text("".join(lines))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))


def write_model(folder: Path, **more) -> Path:
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump({
        "run_mode": "predict", "predict_data": ["a"],
        "model": {"arch": {"type": "LlamaForCausalLM"}, "model_config": {**MODEL, **more}},
    }))  # fmt: skip
    return path


def spec_of(folder: Path) -> DecoderSpec:
    return spec_from_config(load_config(write_model(folder)).config.model)


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, path)


def padded(ids: list[int]) -> list[int]:
    return [*ids[:WIDTH], *[0] * (WIDTH - len(ids))]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("layout", [REPLICAS, SHARDS, STAGES], ids=str)
def test_perplexity(runs, layout):
    ours, plain = (
        json.loads((output(runs, "measured", each) / "eval_result.json").read_text())["PerplexityMetric"]
        for each in (layout, ONE)
    )
    assert ours["PPL"] == pytest.approx(plain["PPL"], rel=1e-5) and ours["tokens"] == plain["tokens"]


@pytest.mark.parametrize("layout", [REPLICAS, SHARDS], ids=str)
def test_answers_to_questions(runs, layout):
    ours, plain = output(runs, "measured", layout), output(runs, "measured", ONE)
    found, wanted = (json.loads((each / "eval_result.json").read_text()) for each in (ours, plain))
    assert found["EmF1Metric"] == wanted["EmF1Metric"] and found["ChoiceMetric"] == wanted["ChoiceMetric"]
    answers = lines_of(ours / "eval_predictions.jsonl")
    assert answers == lines_of(plain / "eval_predictions.jsonl") and all(line["prediction"] for line in answers)
    choices, plain_choices = (lines_of(each / "choice_predictions.jsonl") for each in (ours, plain))
    assert [line.pop("scores") for line in choices] == [
        pytest.approx(line.pop("scores"), rel=1e-5) for line in plain_choices
    ]
    assert choices == plain_choices and (ours / "choice.png").exists()


@pytest.mark.parametrize("layout", [REPLICAS, SHARDS], ids=str)
@pytest.mark.parametrize("name", ["greedy", "sampled", "beams"])
def test_answers_to_prompts(runs, name, layout):
    ours, plain = (output(runs, name, each) for each in (layout, ONE))
    found, wanted = (lines_of(each / "text_generation_result.jsonl") for each in (ours, plain))
    scores = [[line.pop("score", 0.0) for line in lines] for lines in (found, wanted)]
    assert found == wanted and len(found) == len(PROMPTS) * (1 if name == "greedy" else 2)
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert np.load(ours / "answers.npy").tolist() == np.load(plain / "answers.npy").tolist()
    text = (ours / "text_generation_result.txt").read_text()
    assert text == (plain / "text_generation_result.txt").read_text()


def test_rank_0_alone_prints_and_writes(runs):
    out = output(runs, "greedy", REPLICAS)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in names if "rank_1" in name} == {"log/rank_1/info.log", "log/rank_1/error.log"}
    answers = [line["prompt"] + line["text"] for line in lines_of(out / "text_generation_result.jsonl")]
    said = [(runs / "log" / f"worker_{rank}.log").read_text("utf-8", errors="replace") for rank in range(2)]
    assert PROMPTS[3] in answers[3]
    assert PROMPTS[3] in said[0] and PROMPTS[3] not in said[1]
