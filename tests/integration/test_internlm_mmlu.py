"""docs/internlm.md, from CSV files to an array of answers, with the shipped demo runs made smaller still."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "model.model_config.hidden_size": 64,
    "model.model_config.num_layers": 2,
    "model.model_config.num_heads": 4,
    "model.model_config.intermediate_size": 96,
    "model.model_config.vocab_size": 512,
    "model.model_config.seq_length": 320,
    "model.model_config.max_decode_length": 400,
}
SIZE_FLAGS = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
ANIMALS = ["cat", "dog", "owl", "ant", "bee", "fox"]


def script(monkeypatch, name: str, *arguments: object) -> int:
    """Run a script of tools/ in this process; returns its exit code."""
    path = ROOT / "tools" / name
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    return ended.value.code


def transform(monkeypatch, rows: Path, output: str, tokenizer: Path) -> None:
    flags = ["--num_shards", 4, "--model_file", tokenizer, "--seq_length", 320, "--num_workers", 1]
    assert script(
        monkeypatch, "dataset_preprocess/transform_dataset.py", "--input", rows, "--output", output, *flags
    ) == 0


def run_llm(*arguments: object) -> int:
    from llm_core.cli import main

    return main([*map(str, arguments), *SIZE_FLAGS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, marked_spm) -> Path:
    """Questions as MMLU and as CMMLU write them, and a SQuAD file."""
    place = tmp_path_factory.mktemp("internlm")
    (place / "mmlu").mkdir()
    (place / "cmmlu").mkdir()
    for subject in ("anatomy", "virology"):
        rows = [f"Where is the {a}?,{','.join(ANIMALS[i - j] for j in range(4))},A\n" for i, a in enumerate(ANIMALS)]
        (place / "mmlu" / f"{subject}_dev.csv").write_text("".join(rows))
    (place / "cmmlu" / "arts.csv").write_text(",Question,A,B,C,D,Answer\n0,问,一,二,三,四,A\n", encoding="utf-8")
    answer = {"text": "the cat", "answer_start": 0}
    paragraph = {"context": "the cat sat.", "qas": [{"id": "1", "question": "Who sat?", "answers": [answer]}]}
    (place / "squad.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph] * 3}]}))
    return place


def test_the_whole_flow(monkeypatch, folder, marked_spm, capfd):
    tokenizer = ["--processor.tokenizer.vocab_file", marked_spm]
    alpaca = folder / "mmlu_alpaca_format.json"
    assert script(monkeypatch, "dataset_preprocess/mmlu_csv2json.py",
                  "--input", folder / "mmlu", folder / "cmmlu", "--output", alpaca) == 0  # fmt: skip
    transform(monkeypatch, alpaca, f"{folder}/mindrecord/", marked_spm)
    assert len(list((folder / "mindrecord").glob("*.mindrecord?"))) == 4

    other = folder / "b.json"  # what the base has learnt: to say B whatever is asked
    other.write_text(alpaca.read_text(encoding="utf-8").replace("option is A.", "option is B."), encoding="utf-8")
    transform(monkeypatch, other, f"{folder}/before/", marked_spm)
    base = folder / "base"
    assert run_llm("--config", "demo/pretrain_internlm_demo", "--train_dataset_dir", folder / "before",
                   "--train_dataset.input_columns", "[input_ids, labels]", "--do_eval", "False", "--output_dir", base,
                   "--epochs", 20, "--batch_size", 4, "--lr_schedule.learning_rate", 0.01) == 0  # fmt: skip

    assert run_llm("--config", "demo/finetune_internlm_demo_lora_mmlu", "--load_checkpoint", base,
                   "--train_dataset_dir", folder / "mindrecord", "--do_eval", "False", "--output_dir", folder / "lora",
                   "--epochs", 30, "--batch_size", 4, "--lr_schedule.learning_rate", 0.02) == 0  # fmt: skip

    merged = folder / "merged.safetensors"
    assert script(monkeypatch, "merge_lora.py", "--load_checkpoint", base,
                  "--adapter_id", folder / "lora", "--output_path", merged) == 0  # fmt: skip

    assert script(monkeypatch, "dataset_preprocess/squad_data_process.py", "--mode", "eval", "--input_file",
                  folder / "squad.json", "--max_length", 200, "--tokenizer_type", marked_spm,
                  "--output_file", folder / "squad.mindrecord", "--num_workers", 1) == 0  # fmt: skip
    capfd.readouterr()
    assert run_llm("--config", "demo/predict_internlm_demo_eval_squad", "--run_mode", "eval", "--load_checkpoint",
                   merged, "--eval_dataset_dir", folder / "squad.mindrecord", "--output_dir", folder / "squad",
                   *tokenizer, "--model.model_config.max_new_tokens", 4) == 0  # fmt: skip
    assert "total_count: 3" in capfd.readouterr().out
    assert run_llm("--config", "demo/predict_internlm_demo_eval_squad", "--run_mode", "eval", "--load_checkpoint",
                   merged, "--metric.type", "ChoiceMetric", "--metric.path", folder / "mmlu", "--metric.shots", 0,
                   "--output_dir", folder / "choices", *tokenizer) == 0  # fmt: skip
    assert "micro" in capfd.readouterr().out

    answers = {}
    for name, weights in (
        ("merged", ["--load_checkpoint", merged]),
        ("beside", ["--load_checkpoint", base, "--adapter_id", folder / "lora"]),
    ):
        output = folder / f"{name}.npy"
        assert script(monkeypatch, "predict.py", "--config_path", "demo/predict_internlm_demo_mmlu",
                      "--input_file", alpaca, "--output_file", output, *weights, *tokenizer,
                      "--output_dir", folder / "predict", *SIZE_FLAGS) == 0  # fmt: skip
        answers[name] = np.load(output)
    assert answers["merged"].shape == (13,)
    assert answers["merged"].tolist() == answers["beside"].tolist()
    assert all("The right option is A." in answer for answer in answers["merged"])
    readable = json.loads((folder / "merged.npy.json").read_text(encoding="utf-8"))
    assert [pair["answer"] for pair in readable] == answers["merged"].tolist()
    assert readable[0]["prompt"].startswith("<s><|User|>:The following question about anatomy")
