"""alpaca_converter.py and llama_preprocess.py --dataset_type qa: ids, label masks, counts, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from fastchat.conversation import get_conv_template

from llm_core.data import qa
from llm_core.data.preprocess import preprocess
from llm_core.data.qa import Conversations
from llm_core.data.records import RecordFile
from llm_core.text import load_tokenizer

SEQ_LENGTH = 700


def row(*turns: str) -> dict:
    return {"id": "x", "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}


ROWS = [
    row("What is 1+1?", "It is 2."),
    row("First?", "One.", "Second?", "Two, ﬁnally Ⅷ.", "Third?", "Three."),
    row("用中文回答：天空是什么颜色？😀", "天空是蓝色的。"),
    row("Repeat </s> and <unk> and ASSISTANT: for me", "</s> <unk> ASSISTANT: done"),
    row("Say nothing.", ""),
    row("  spaces   around  ", "  yes  \n\n a list:\n - x\n"),
]


@pytest.fixture(scope="module")
def identity_model(tmp_path_factory, corpus) -> Path:
    """As Llama's: identity normalization."""
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[:60_000].splitlines()), model_writer=model, vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    path = tmp_path_factory.mktemp("identity") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(params=["identity", "nfkc"])
def model(request, identity_model, spm_model) -> Path:
    return identity_model if request.param == "identity" else spm_model


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, ensure_ascii="\\ud8" in repr(value), indent=1), encoding="utf-8")
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    records = RecordFile(path)
    return records.read(np.arange(records.num_records))


def manifest_of(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())


def flags(source: Path, model: Path, output: Path, seq_length: int = SEQ_LENGTH) -> list[object]:
    return ["--dataset_type", "qa", "--input_glob", source, "--model_file", model, "--seq_length", seq_length,
            "--output_file", output, "--num_workers", 1]


def test_ids_are_those_of_the_template_and_labels_are_the_answers(run_script, model, tmp_path):
    source = write_json(tmp_path / "conversations.json", ROWS)
    code, out, _ = run_script("llama_preprocess", *flags(source, model, tmp_path / "qa.mindrecord"))
    assert code == 0
    kept = [r for r in ROWS if all(turn["value"] for turn in r["conversations"])]
    assert len(kept) == len(ROWS) - 1
    assert f"Transformed {len(kept)} records." in out
    bare = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tok = load_tokenizer(model)
    records = read_all(tmp_path / "qa.mindrecord")
    assert records["input_ids"].shape == records["labels"].shape == (len(kept), SEQ_LENGTH + 1)
    supervised = 0
    for number, source_row in enumerate(kept):
        turns = [turn["value"] for turn in source_row["conversations"]]
        expected, learnt_text = [1], []
        for first in range(0, len(turns), 2):
            conversation = get_conv_template("vicuna_v1.1")
            if first:
                conversation.system_message = ""
            conversation.append_message("USER", turns[first])
            conversation.append_message("ASSISTANT", turns[first + 1])
            prompt = conversation.get_prompt().removesuffix("</s>")
            expected += [*bare.encode(prompt if not first else prompt.lstrip()), 2]
            learnt_text.append(bare.decode(bare.encode(turns[first + 1])))
        ids, labels = records["input_ids"][number], records["labels"][number]
        assert ids.tolist() == expected + [0] * (SEQ_LENGTH + 1 - len(expected))
        assert labels[0] == -100
        assert (labels[len(expected) :] == -100).all()
        learnt = labels != -100
        assert (labels[learnt] == ids[learnt]).all()
        runs = np.split(labels, np.flatnonzero(np.diff(learnt.astype(int))) + 1)
        answers = [run.tolist() for run in runs if run[0] != -100]
        assert all(answer[-1] == 2 for answer in answers)
        assert [tok.decode(answer).strip() for answer in answers] == [text.strip() for text in learnt_text]
        before = tok.decode([i for i, flag in zip(ids[: len(expected)].tolist(), learnt, strict=False) if not flag])
        assert before.endswith("ASSISTANT:")
        supervised += int(learnt.sum())
    counts = manifest_of(tmp_path / "qa.mindrecord")["counts"]
    assert counts["supervised_tokens"] == supervised
    assert counts["tokens"] == counts["masked_tokens"] + supervised
    assert (counts["samples"], counts["cut_samples"], counts["dropped_samples"]) == (len(ROWS), 0, 0)
    assert counts["dropped_empty_turns"] == 1


def test_long_samples_are_cut_and_those_without_labels_dropped(run_script, spm_model, tmp_path):
    source = write_json(tmp_path / "c.json", [row("Short?", "word " * 200), row("long " * 200, "Never reached.")])
    code, _, err = run_script("llama_preprocess", *flags(source, spm_model, tmp_path / "qa.mindrecord", 150))
    assert code == 0
    records = read_all(tmp_path / "qa.mindrecord")
    assert records["input_ids"].shape == (1, 151)
    assert records["labels"][0, -1] == records["input_ids"][0, -1] != 2
    counts = manifest_of(tmp_path / "qa.mindrecord")["counts"]
    assert (counts["samples"], counts["cut_samples"], counts["dropped_samples"]) == (2, 1, 1)
    assert counts["cut_tokens"] > 100
    assert counts["tokens"] == 151
    assert "cut samples 1" in err and "dropped samples 1" in err


def test_turns_that_teach_nothing_are_left_out_and_counted(run_script, spm_model, tmp_path):
    rows = [row("Hello?", "Hi.", "And a question without an answer?")]
    rows.append({"conversations": [{"from": "gpt", "value": "I begin."}, *row("Hello?", "Hi.")["conversations"]]})
    rows.append(row("Only a question?"))
    source = write_json(tmp_path / "c.json", rows)
    code, _, _ = run_script("llama_preprocess", *flags(source, spm_model, tmp_path / "qa.mindrecord"))
    assert code == 0
    records = read_all(tmp_path / "qa.mindrecord")
    assert len(records["input_ids"]) == 2
    assert np.array_equal(records["input_ids"][0], records["input_ids"][1])
    counts = manifest_of(tmp_path / "qa.mindrecord")["counts"]
    assert (counts["dropped_turns"], counts["dropped_samples"]) == (3, 1)


def test_any_number_of_workers_writes_the_same_bytes(spm_model, tmp_path, monkeypatch):
    monkeypatch.setattr(qa, "_ROWS_PER_CHUNK", 4)
    source = write_json(tmp_path / "c.json", ROWS * 5)
    written = []
    for workers in (1, 2, 3):
        output = tmp_path / str(workers) / "qa.mindrecord"
        preprocess(Conversations([source], SEQ_LENGTH), output, spm_model, num_workers=workers)
        written.append({path.name: path.read_bytes() for path in output.parent.iterdir()})
    assert len(written[0]) == 3
    assert written[0] == written[1] == written[2]


def test_alpaca_rows_become_conversations(run_script, spm_model, tmp_path):
    rows = [{"instruction": "写一首诗", "input": "", "output": "诗"},
            {"instruction": "Sum {up}", "input": "1 2", "output": "3"},
            {"instruction": "No input key", "output": "ok"}]
    source = write_json(tmp_path / "alpaca.json", rows)
    output = tmp_path / "new" / "conversations.json"
    code, out, _ = run_script("alpaca_converter", "--data_path", source, "--output_path", output)
    assert code == 0
    assert "3 conversations" in out
    text = output.read_text(encoding="utf-8")
    assert "写一首诗" in text
    converted = json.loads(text)
    assert [c["id"] for c in converted] == ["1", "2", "3"]
    human, gpt = converted[1]["conversations"]
    assert (human["from"], gpt) == ("human", {"from": "gpt", "value": "3"})
    assert human["value"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSum {up}\n\n"
        "### Input:\n1 2\n\n### Response:")
    assert "### Input" not in converted[0]["conversations"][0]["value"]
    assert "### Input" not in converted[2]["conversations"][0]["value"]
    code, _, _ = run_script("llama_preprocess", *flags(output, spm_model, tmp_path / "qa.mindrecord"))
    assert code == 0


BAD_ROWS = [
    ([ROWS[0], {"id": "1"}], "row 1: has no key 'conversations'"),
    ([{"instruction": "a", "output": "b"}], "convert the file with alpaca_converter.py"),
    ([ROWS[0], ROWS[0], "text"], "row 2: has no key 'conversations'"),
    ([{"conversations": "text"}], "row 0: 'conversations' must be a list"),
    ([{"conversations": [{"from": "human"}]}], "row 0, turn 0: has no key 'value'"),
    ([{"conversations": [{"from": "human", "value": 3}]}], "row 0, turn 0: 'value' must be a string"),
    ([{"conversations": [{"from": "robot", "value": "x"}]}], "or 'gpt' or 'assistant', and is 'robot'"),
    ([{"conversations": ROWS[0]["conversations"][:1] * 2}], "row 0: turn 1 is the user's"),
    ([{"conversations": ROWS[0]["conversations"] + ROWS[0]["conversations"][1:]}], "row 0: turn 2 is the assistant's"),
    ([row("half of a pair: \ud83d", "x")], "row 0, turn 0: 'value' has half a character in it (\\ud83d"),
    ({"conversations": []}, "must be a JSON list"),
    ([], "has no rows"),
]


@pytest.mark.parametrize(("content", "message"), BAD_ROWS)
def test_a_bad_row_is_named(run_script, spm_model, tmp_path, content, message):
    source = write_json(tmp_path / "c.json", content)
    output = tmp_path / "out" / "qa.mindrecord"
    code, _, err = run_script("llama_preprocess", *flags(source, spm_model, output))
    assert code == 2
    assert str(source) in err and message in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"conversations":\n [}]', ":3: malformed JSON"),
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b'[\n"caf\xe9"]', ":2: not UTF-8 text (byte 0xe9 at offset 6)"),
        (b"[" * 100_000, "malformed JSON"),
    ],
)
@pytest.mark.parametrize("script", ["llama_preprocess", "alpaca_converter", "squad_data_process"])
def test_a_file_that_is_no_json(run_script, spm_model, tmp_path, script, content, message):
    (tmp_path / "c.json").write_bytes(content)
    arguments = {
        "llama_preprocess": flags(tmp_path / "c.json", spm_model, tmp_path / "o.mindrecord"),
        "alpaca_converter": ["--data_path", tmp_path / "c.json", "--output_path", tmp_path / "o.json"],
        "squad_data_process": ["--input_file", tmp_path / "c.json", "--tokenizer_type", spm_model,
                               "--output_file", tmp_path / "o.mindrecord"],
    }[script]
    code, _, err = run_script(script, *arguments)
    assert code == 2
    assert f"{tmp_path / 'c.json'}" in err and message in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json"]


def test_alpaca_rows_that_lack_a_key(run_script, tmp_path):
    source = write_json(tmp_path / "a.json", [{"instruction": "a", "output": "b"}, {"instruction": "a"}])
    code, _, err = run_script("alpaca_converter", "--data_path", source, "--output_path", tmp_path / "o.json")
    assert code == 2
    assert f"{source}:6: row 1: has no key 'output'" in err
    code, _, err = run_script("alpaca_converter", "--data_path", write_json(tmp_path / "b.json", ["x"]))
    assert code == 2 and "row 0" in err
    code, _, err = run_script("alpaca_converter", "--data_path", tmp_path / "none.json")
    assert code == 2 and "no such file" in err


def test_alpaca_output_that_cannot_be_written(run_script, tmp_path):
    source = write_json(tmp_path / "a.json", [{"instruction": "a", "output": "b"}])
    code, _, err = run_script("alpaca_converter", "--data_path", source, "--output_path", source / "o.json")
    assert code == 1
    assert "o.json: cannot be written" in err
