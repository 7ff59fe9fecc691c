"""Accuracy and F1: against plain definitions, and MRPC from the MSR file over a LoRA training to an evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_core.config import load_config
from llm_core.data.loader import Loader
from llm_core.data.mrpc import Mrpc, Pair
from llm_core.data.preprocess import preprocess
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.errors import UserError
from llm_core.evals.classification import Classification, summarize
from llm_core.evals.run import evaluate
from llm_core.infer.load import load_completer
from llm_core.models.heads import build_model
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.report.metrics import read_metrics
from llm_core.text import load_tokenizer
from llm_core.train.run import train

SPEC = DecoderSpec(
    vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn_size=24, max_position=16,
    initializer_range=0.5, head="sequence",
)  # fmt: skip


def test_f1_of_two_classes_and_of_more():
    predicted, wanted = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    two = summarize(np.ones(5), predicted, wanted, 2)
    assert two.accuracy == 0.6 and two.f1 == pytest.approx(2 * 2 / (3 + 3)) and two.total == 5  # 2 hits, 3 found, 3 are
    three = summarize(np.ones(4), np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2]), 3)
    assert three.f1 == pytest.approx(np.mean([1, 2 / 3, 2 / 3]))
    assert summarize(np.ones(2), np.zeros(2), np.zeros(2), 2).f1 == 0.0  # nothing of class 1 anywhere
    assert "f1" not in summarize(np.ones(2), np.ones(2), np.ones(2), None).figures()


def records(path: Path, ids: np.ndarray, labels: np.ndarray) -> RecordFile:
    columns = {"input_ids": ids.shape[1], "labels": ids.shape[1]}
    with RecordWriter(path, columns=columns, manifest={"kind": "classification"}) as writer:
        writer.write_rows({"input_ids": ids, "labels": labels})
    return RecordFile(path)


def loader_of(path: Path, head: str, length: int = 12) -> Loader:
    """Seven records of a head, of unequal lengths, padded with the very id that the texts end with."""
    random = np.random.RandomState(5)
    ids = random.randint(3, 64, (7, length + 1)).astype(np.int32)
    labels = np.full_like(ids, -100)
    for row, last in enumerate((11, 4, 7, 2, 9, 11, 6)):
        ids[row, last:] = 1
        if head == "sequence":
            labels[row, last + 1] = row % 2
        elif head == "token":
            labels[row, 1 : last + 2] = random.randint(0, 2, last + 1)
        else:  # the answer's first place, and the one behind its last
            labels[row, 1], labels[row, last + 1] = 0, 1
    found = records(path, ids, labels)
    return Loader(found, batch_size=3, seq_length=length, columns=["input_ids", "labels"], vocab_size=64, kind="eval")


@pytest.mark.parametrize("head", ["sequence", "token", "question"])
def test_a_classifier_is_measured_at_its_labels(tmp_path, head):
    from mindspore import Tensor

    net = build_model(replace(SPEC, head=head), seed=2)
    loader = loader_of(tmp_path / "r.mindrecord", head)
    measured = Classification(net).measure(loader)
    batch = loader.read(np.arange(7))
    tokens, labels = batch.input_ids[:, :-1], batch.labels[:, 1:]
    if head == "sequence":
        last = (labels >= 0).argmax(1)
        logits = net(Tensor(tokens), Tensor(last.astype(np.int32))).asnumpy().astype(np.float64)
        wanted = labels[np.arange(7), last]
    else:
        logits = net(Tensor(tokens)).asnumpy().astype(np.float64)
    if head == "question":
        starts, ends = (labels == 0).argmax(1) + 1, (labels == 1).argmax(1)
        assert measured.accuracy == np.mean((logits.argmax(1) == np.stack([starts, ends], 1)).all(1))
        nll = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
        rows = np.arange(7)
        assert measured.loss == pytest.approx(np.mean(nll[rows, starts, 0] + nll[rows, ends, 1]) / 2, rel=1e-5)
        assert measured.f1 is None and measured.total == 7
        return
    if head == "token":
        logits, wanted = logits[labels >= 0], labels[labels >= 0]
    assert measured.total == len(wanted) and measured.accuracy == np.mean(logits.argmax(-1) == wanted)
    nll = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    assert measured.loss == pytest.approx(nll[np.arange(len(wanted)), wanted].mean(), rel=1e-5)


def test_records_that_do_not_fit(tmp_path):
    ids = np.ones((2, 13), np.int32)
    labels = np.full_like(ids, -100)
    net = build_model(SPEC, seed=2)
    options = dict(batch_size=2, seq_length=12, columns=["input_ids", "labels"], vocab_size=64, num_labels=2)
    bare = Loader(records(tmp_path / "bare.mindrecord", ids, labels), **options)
    with pytest.raises(UserError, match="not one record has a label; .*mrpc_process.py"):
        Classification(net).measure(bare)
    labels[1, 5] = 2
    beyond = Loader(records(tmp_path / "beyond.mindrecord", ids, labels), **options)
    with pytest.raises(UserError, match=r"labels\[5\] is 2, and the model's classes are 0 .. 1. Set .*num_labels"):
        Classification(net).measure(beyond)


# ------------------------------------------------------------------------------------------------ MRPC, a whole flow

RUN = """
seed: 3
run_mode: finetune
output_dir: OUT
context: {device_target: CPU}
model:
  arch: {type: FalconForSequenceClassification}
  model_config:
    {type: FalconConfig, vocab_size: 512, hidden_size: 64, num_layers: 2, num_heads: 4, seq_length: 64, alibi: True,
     bias: True, parallel_attn: False, multi_query: False, bos_token_id: 2, eos_token_id: 2, pad_token_id: 2,
     compute_dtype: float32, param_init_type: float32, initializer_range: 0.08, num_labels: 2, pet_config: PET}
runner_config: {batch_size: 16, epochs: 60}
optimizer: {type: AdamW}
lr_schedule: {type: LinearWithWarmUpLR, learning_rate: 5.e-3}
train_dataset:
  data_loader: {dataset_dir: DATA/train.mindrecord}
  input_columns: [input_ids, labels]
eval_dataset:
  data_loader: {dataset_dir: DATA/train.mindrecord, shuffle: False}
  input_columns: [input_ids, labels]
  drop_remainder: False
do_eval: True
eval_step_interval: 0
eval_epoch_interval: 15
metric: {type: ClassificationMetric}
callbacks:
  - {type: MFLossMonitor, per_print_times: 20}
  - {type: CheckpointMonitor, prefix: mrpc, save_checkpoint_steps: 0}
"""
PET = (
    "{pet_type: lora, lora_rank: 8, lora_alpha: 16, lora_dropout: 0.1, target_modules: 'wq|wk|wv|wo|w1|w2'}"
)


def pairs(count: int) -> list[Pair]:
    """Half of them say the same in two orders, the others not."""
    words = "cat dog bird fish tree house river stone cloud road lamp book".split()
    random = np.random.RandomState(0)
    rows = []
    for number in range(count):
        first, second, third, fourth = (words[index] for index in random.permutation(len(words))[:4])
        other = f"the {second} saw the {first}" if number % 2 else f"the {third} saw the {fourth}"
        rows.append(Pair(f"the {first} saw the {second}", other, number % 2))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spm_model) -> Path:
    """train.mindrecord of 64 pairs; base.safetensors, a base model without a head."""
    folder = tmp_path_factory.mktemp("mrpc")
    source = folder / "pairs.txt"
    source.write_text("the pairs are made here")
    preprocess(Mrpc(source, pairs(64), 64, {"part": "train"}), folder / "train.mindrecord", spm_model, num_workers=1)
    text = run_text(folder, folder, "null").replace("SequenceClassification", "CausalLM")
    (folder / "base.yaml").write_text(text)
    net = build_model(spec_from_config(load_config(folder / "base.yaml").config.model), seed=4)
    save_file({name: p.asnumpy() for name, p in net.parameters_dict().items()}, folder / "base.safetensors")
    return folder


def run_text(folder: Path, output: Path, pet: str = PET) -> str:
    return RUN.replace("OUT", str(output)).replace("DATA", str(folder)).replace("PET", pet)


def load(folder: Path, output: Path, *more: tuple[str, str], pet: str = PET):
    (output.parent / "run.yaml").write_text(run_text(folder, output, pet))
    given = [("load_checkpoint", str(folder / "base.safetensors")), *more]
    return load_config(output.parent / "run.yaml", given)


def test_lora_learns_64_pairs(folder, tmp_path, capsys, spm_model):
    """The score head is trained with the adapter and saved with it; accuracy and F1 while training and afterwards."""
    output = tmp_path / "out"
    assert train(load(folder, output)) == 0
    said = capsys.readouterr()
    assert "the classifier's head, which starts fresh" in said.err
    measured = [line for line in read_metrics(output / "metrics.jsonl") if "accuracy" in line]
    assert [line["step"] for line in measured] == [60, 120, 180, 240] and "ppl" not in measured[0]
    assert measured[-1]["accuracy"] >= 0.95 and measured[-1]["f1"] >= 0.95
    assert measured[-1]["eval_loss"] < measured[0]["eval_loss"]
    assert "ClassificationMetric = {'ClassificationMetric': {'accuracy': " in said.out

    assert evaluate(load(folder, tmp_path / "eval", ("run_mode", "eval"), ("adapter_id", str(output)))) == 0
    figures = json.loads((tmp_path / "eval" / "eval_result.json").read_text())["ClassificationMetric"]
    assert figures["accuracy"] == measured[-1]["accuracy"] and figures["f1"] == measured[-1]["f1"]
    assert figures["loss"] == pytest.approx(measured[-1]["eval_loss"], rel=1e-4) and figures["total"] == 64

    tokenizer = load_tokenizer(spm_model)  # padding is the end's id, and the class is read at a real token all the same
    rows = RecordFile(folder / "train.mindrecord").read(np.arange(64))
    last = np.take_along_axis(rows["input_ids"], (rows["labels"] != -100).argmax(1)[:, None] - 1, 1)
    assert set(last.ravel()) == {tokenizer.encode("\nParaphrase:")[-1]}


def test_a_base_model_is_not_measured(folder, tmp_path):
    loaded = load(folder, tmp_path / "out", ("run_mode", "eval"), pet="null")
    with pytest.raises(UserError, match="the weights hold no head of this classifier.*--adapter_id"):
        evaluate(loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("train_dataset.input_columns", "[input_ids]"), "a classifier learns from labels: set input_columns"),
        (("model.arch.type", "FalconForCausalLM"), "its labels are classes, and the model predicts tokens"),
    ],
)
def test_data_that_is_no_classifiers(folder, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train(load(folder, tmp_path / "out", change))


def test_a_classifier_writes_no_text(folder, tmp_path):
    with pytest.raises(UserError, match="a classifier writes no text; --run_mode eval measures it"):
        load(folder, tmp_path / "out", ("run_mode", "predict"), ("predict_data", "Hello")).require_runnable()
    with pytest.raises(UserError, match="a classifier writes no text"):
        load_completer(load(folder, tmp_path / "out"))


SHRUNKEN = {
    "vocab_size": "512", "hidden_size": "32", "num_layers": "1", "num_heads": "4", "seq_length": "64",
    "ffn_hidden_size": "48", "compute_dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize("name", ["falcon/lora_falcon_rw_1b_mrpc.yaml", "demo/lora_falcon_demo_mrpc.yaml"])
def test_the_shipped_runs_start(folder, tmp_path, capsys, name):
    path = Path(__file__).parents[2] / "configs" / name
    spec = spec_from_config(load_config(path).config.model)
    assert spec.head == "sequence" and spec.num_labels == 2
    data, output = str(folder / "train.mindrecord"), tmp_path / "out"
    sizes = [(f"model.model_config.{key}", value) for key, value in SHRUNKEN.items()]
    given = [
        ("train_dataset.data_loader.dataset_dir", data), ("eval_dataset.data_loader.dataset_dir", data),
        ("output_dir", str(output)), ("runner_config.epochs", "1"), ("context.device_target", "CPU"),
    ]  # fmt: skip
    loaded = load_config(path, [*sizes, *given])
    loaded.require_runnable()
    assert train(loaded) == 0
    (measured,) = [line for line in read_metrics(output / "metrics.jsonl") if "accuracy" in line]
    assert measured["step"] == 8 and 0 <= measured["f1"] <= 1
    assert "lora" in capsys.readouterr().err
