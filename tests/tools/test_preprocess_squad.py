"""squad_data_process.py: training and evaluation records, gold answers, too long passages, bad input."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from llm_core.data import squad
from llm_core.data.preprocess import preprocess
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.data.squad import Squad
from llm_core.errors import EnvironmentFault
from llm_core.text import load_tokenizer

LONG = "An endless passage about nothing in particular. " * 40


def qas(question: str, *answers: str) -> dict:
    return {"id": question[:4], "question": question, "answers": [{"text": a, "answer_start": 0} for a in answers]}


DATA = {"version": "1.1", "data": [
    {"title": "One", "paragraphs": [
        {"context": "The cat sat on the mat in Paris.",
         "qas": [qas("Where did the cat sit?", "on the mat", "the mat"), qas("Which city?", "Paris")]},
        {"context": "天空是蓝色的。", "qas": [qas("什么颜色？", "蓝色", "蓝色的")]},
    ]},
    {"title": "Two", "paragraphs": [
        {"context": LONG, "qas": [qas("What is it about?", "nothing in particular", "nothing")]},
        {"context": "Nobody knows.", "qas": [qas("Who knows?")]},
    ]},
]}


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(DATA, ensure_ascii=False), encoding="utf-8")
    return path


def prompt_of(passage: str, question: str) -> str:
    return ("Read the passage and answer the question below.\n\n### Instruction:\n" + passage
            + "\n\n### Input:\n" + question + "\n\n### Response:")


def run(run_script, source: Path, model: Path, output: Path, *more: object) -> tuple[int, str, str]:
    return run_script("squad_data_process", "--input_file", source, "--output_file", output,
                      "--tokenizer_type", model, "--num_workers", 1, *more)


def read_all(path: Path) -> dict[str, np.ndarray]:
    records = RecordFile(path)
    return records.read(np.arange(records.num_records))


def manifest_of(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())


def test_training_records(run_script, source, spm_model, tmp_path):
    output = tmp_path / "train.mindrecord"
    code, out, _ = run(run_script, source, spm_model, output, "--mode", "train", "--max_length", 300)
    assert code == 0
    tok = load_tokenizer(spm_model)
    records = read_all(output)
    assert "Transformed 2 records." in out
    assert records["input_ids"].shape == (2, 301)
    for ids, labels, question in zip(records["input_ids"], records["labels"], squad.read_squad(source, False)[0],
                                     strict=False):
        prompt = prompt_of(question.passage, question.question)
        expected = [1, *tok.encode(prompt + question.answers[0]), 2]
        assert ids.tolist() == expected + [0] * (301 - len(expected))
        learnt = labels != -100
        assert tok.decode(labels[learnt].tolist()) == question.answers[0]
        assert labels[learnt][-1] == 2
        assert np.flatnonzero(learnt).tolist() == list(range(len(expected) - learnt.sum(), len(expected)))
    counts = manifest_of(output)["counts"]
    assert (counts["samples"], counts["dropped_samples"]) == (3, 1)  # the long passage
    assert (counts["questions_in_file"], counts["questions_without_answer"]) == (5, 1)


def test_evaluation_records_and_gold_answers(run_script, source, spm_model, tmp_path):
    output = tmp_path / "eval.mindrecord"
    code, _, _ = run(run_script, source, spm_model, output, "--mode", "eval", "--max_length", 300)
    assert code == 0
    tok = load_tokenizer(spm_model)
    records = read_all(output)
    assert records["input_ids"].shape == records["labels"].shape == (3, 300)
    golds_file = tmp_path / "eval.mindrecord.golds.jsonl"
    golds = [json.loads(line) for line in golds_file.read_text(encoding="utf-8").splitlines()]
    assert [gold["record"] for gold in golds] == [0, 1, 2]
    assert golds[0] == {"record": 0, "id": "Wher", "question": "Where did the cat sit?",
                        "answers": ["on the mat", "the mat"]}
    for ids, labels, gold in zip(records["input_ids"], records["labels"], golds, strict=True):
        assert tok.decode(labels[labels != 0].tolist()) == gold["answers"][0]
        prompt = tok.decode(ids[ids != 0].tolist())
        assert prompt.endswith("### Response:")
        assert gold["question"].replace("？", "?") in prompt  # the tokenizer normalizes
    question = DATA["data"][0]["paragraphs"][0]
    expected = [1, *tok.encode(prompt_of(question["context"], question["qas"][0]["question"]))]
    assert records["input_ids"][0].tolist() == expected + [0] * (300 - len(expected))
    assert records["input_ids"][2].all()  # the long passage was cut to fill the row
    manifest = manifest_of(output)
    assert (manifest["counts"]["cut_samples"], manifest["counts"]["dropped_samples"]) == (1, 0)
    assert manifest["counts"]["cut_tokens"] > 100
    facts = manifest["side_files"]["eval.mindrecord.golds.jsonl"]
    content = golds_file.read_bytes()
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_run_that_fails_at_the_end_leaves_both_files_as_they_were(source, spm_model, tmp_path, monkeypatch):
    output = tmp_path / "eval.mindrecord"
    preprocess(Squad(source, 300, "eval"), output, spm_model, num_workers=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("eval")}

    def full(self):
        raise EnvironmentFault("the disk is full")

    monkeypatch.setattr(RecordWriter, "_move_into_place", full)
    with pytest.raises(EnvironmentFault):
        preprocess(Squad(source, 300, "eval", all_questions=True), output, spm_model, num_workers=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("eval")} == before


def test_all_questions(run_script, source, spm_model, tmp_path):
    output = tmp_path / "eval.mindrecord"
    code, _, _ = run(run_script, source, spm_model, output, "--mode", "eval", "--max_length", 300, "--all_questions")
    assert code == 0
    golds = [json.loads(line) for line in (tmp_path / "eval.mindrecord.golds.jsonl").read_text().splitlines()]
    assert [gold["answers"][0] for gold in golds] == ["on the mat", "Paris", "蓝色", "nothing in particular"]
    assert RecordFile(output).num_records == 4


def test_questions_that_are_too_long_are_dropped(run_script, source, spm_model, tmp_path):
    output = tmp_path / "eval.mindrecord"
    code, _, err = run(run_script, source, spm_model, output, "--mode", "eval", "--max_length", 35)
    assert code == 2 or RecordFile(output).num_records < 3
    code, _, err = run(run_script, source, spm_model, output, "--mode", "train", "--max_length", 5)
    assert code == 2
    assert "not one record" in err


def test_any_number_of_workers_writes_the_same_bytes(source, spm_model, tmp_path, monkeypatch):
    monkeypatch.setattr(squad, "_QUESTIONS_PER_CHUNK", 1)
    written = []
    for workers in (1, 2):
        output = tmp_path / str(workers) / "eval.mindrecord"
        preprocess(Squad(source, 300, "eval"), output, spm_model, num_workers=workers)
        written.append({path.name: path.read_bytes() for path in output.parent.iterdir()})
    assert len(written[0]) == 4
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no list 'data'"),
        ({"data": [{"title": "x"}]}, "article 0: has no list 'paragraphs'"),
        ({"data": [{"paragraphs": [{"context": "c"}]}]}, "article 0, paragraph 0: has no list 'qas'"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "paragraph 0: has no key 'context'"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"answers": []}]}]}]}, "question 0: has no key 'question'"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}, "has no list 'answers'"),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{}]}]}]}]},
         "question 0, answer 0: has no key 'text'"),
        ({"data": []}, "no question with an answer"),
    ],
)
def test_what_is_not_squad(run_script, spm_model, tmp_path, content, message):
    source = tmp_path / "bad.json"
    source.write_text(json.dumps(content))
    code, _, err = run(run_script, source, spm_model, tmp_path / "o.mindrecord")
    assert code == 2
    assert str(source) in err and message in err
    assert not (tmp_path / "o.mindrecord").exists()


def test_flags(run_script, source, spm_model, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_LLM_TOKENIZERS", str(tmp_path))
    assert run_script("squad_data_process", "--input_file", source, "--mode", "test")[0] == 2
    code, _, err = run_script("squad_data_process", "--input_file", source, "--output_file", tmp_path / "o.mindrecord")
    assert code == 2
    assert "llama_7b: neither a file nor a tokenizer in" in err  # MindFormers' default is a name
    (tmp_path / "llama_7b.model").write_bytes(spm_model.read_bytes())
    code, _, _ = run_script("squad_data_process", "--input_file", source, "--output_file", tmp_path / "o.mindrecord")
    assert code == 0
    assert RecordFile(tmp_path / "o.mindrecord").columns == {"input_ids": 2049, "labels": 2049}
    code, _, err = run(run_script, source, spm_model, tmp_path / "o.mindrecord", "--max_length", 0)
    assert code == 2
    assert "--max_length 0" in err
