"""llama_preprocess.py's other formats, transform_dataset.py and mmlu_csv2json.py, from files to records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm_core.data.records import RecordFile
from llm_core.text import load_tokenizer

SEQ_LENGTH = 200
ALPACA = [
    {"instruction": "Add the numbers.", "input": "1 2", "output": "3"},
    {"instruction": "写一首诗", "input": "", "output": "床前明月光"},
]


def read_all(path: Path) -> dict[str, np.ndarray]:
    records = RecordFile(path)
    return records.read(np.arange(records.num_records))


def counts_of(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())["counts"]


def flags(source: object, model: Path, output: Path, *more: object) -> list[object]:
    return ["--input_glob", source, "--model_file", model, "--seq_length", SEQ_LENGTH, "--output_file", output,
            "--num_workers", 1, *more]  # fmt: skip


def learnt_texts(records: dict[str, np.ndarray], tokenizer) -> list[str]:
    return [tokenizer.decode(row[row != -100].tolist()).strip() for row in records["labels"]]


SOURCES = {
    "alpaca": (json.dumps(ALPACA, ensure_ascii=False), ["3", "床前明月光"]),
    "src_tgt": ('{"src": "a", "tgt": "one"}\n{"src": ["b", "c"], "tgt": ["two", "three"]}\n', ["one", "two three"]),
    "messages": ('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', ["a"]),
    "sharegpt": ('[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]', ["a"]),
    "oasst1": (
        '{"message_tree_id": "1", "prompt": {"text": "q", "role": "prompter", "replies": ['
        '{"text": "bad", "role": "assistant", "rank": 1}, {"text": "good", "role": "assistant", "rank": 0}]}}',
        ["good"],
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_conversations_of_every_format(run_script, marked_spm, tmp_path, kind):
    content, answers = SOURCES[kind]
    source, output = tmp_path / "data.json", tmp_path / "out.mindrecord"
    source.write_text(content, encoding="utf-8")
    code, _, err = run_script("llama_preprocess", *flags(source, marked_spm, output))
    assert code == 0, err
    assert f"--dataset_type {kind}, told from {source}" in err
    assert learnt_texts(read_all(output), load_tokenizer(marked_spm)) == answers
    named = tmp_path / "named.mindrecord"
    code, _, _ = run_script("llama_preprocess", *flags(source, marked_spm, named, "--dataset_type", kind))
    assert code == 0
    assert np.array_equal(read_all(named)["input_ids"], read_all(output)["input_ids"])


def test_text_and_jsonl_become_one_run(run_script, marked_spm, tmp_path):
    tokenizer = load_tokenizer(marked_spm)
    documents = ["First, with\n  an indented line.", "= No title here =", "第三段。😀 " * 300]
    (tmp_path / "a.txt").write_text("\n\n \n".join(documents) + "\n", encoding="utf-8")
    rows = [*documents, " ", "last one"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows), encoding="utf-8")
    for name, kind, texts in (("a.txt", "text", documents), ("a.jsonl", "jsonl", [*documents, "last one"])):
        output = tmp_path / f"{kind}.mindrecord"
        code, _, err = run_script(
            "llama_preprocess", *flags(tmp_path / name, marked_spm, output, "--dataset_type", kind)
        )
        assert code == 0, err
        run = [i for text in texts for i in tokenizer.encode(text.rstrip() if kind == "text" else text, True, True)]
        records = read_all(output)["input_ids"]
        assert records.reshape(-1).tolist() == run[: records.size]
        counts = counts_of(output)
        assert counts["documents"] == len(texts)
        assert counts["dropped_tail_tokens"] == len(run) - records.size
        assert counts.get("dropped_empty", 1) == 1


@pytest.mark.parametrize("line", ['{"text": 3}', '{"txt": "x"}', '{"text": "x"', '"x"'])
def test_a_bad_line_of_text_is_named(run_script, marked_spm, tmp_path, monkeypatch, line):
    from llm_core.data import plain

    monkeypatch.setattr(plain, "_CHUNK_BYTES", 64)
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "' + "word " * 20 + '"}\n' + '{"text": "fine"}\n' * 30 + line + "\n")
    code, _, err = run_script(
        "llama_preprocess", *flags(source, marked_spm, tmp_path / "o.mindrecord", "--dataset_type", "jsonl")
    )
    assert code == 2
    assert f"{source}:32: " in err


def test_a_json_list_is_no_jsonl(run_script, marked_spm, tmp_path):
    source = tmp_path / "a.json"
    source.write_text('[{"text": "x"}]')
    code, _, err = run_script("llama_preprocess", *flags(source, marked_spm, tmp_path / "o.mindrecord"))
    assert code == 2 and "give a row a line" in err


def test_empty_turns_are_left_out_counted_and_named(run_script, marked_spm, tmp_path):
    source, output = tmp_path / "a.jsonl", tmp_path / "o.mindrecord"
    rows = [ALPACA[0], {"instruction": "Say nothing.", "output": ""}, {"instruction": " ", "output": "x"}, ALPACA[1]]
    source.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run_script("llama_preprocess", *flags(source, marked_spm, output, "--repeat", 2))
    assert code == 0
    assert err.count("has an empty turn") == 1 and f"{source}:2: has an empty turn" in err
    assert len(read_all(output)["labels"]) == 4
    assert counts_of(output)["dropped_empty_turns"] == 4  # both times
    assert "dropped empty turns 4" in err


def test_long_rows_are_cut_or_dropped_as_asked(run_script, marked_spm, tmp_path):
    source = tmp_path / "a.json"
    source.write_text(json.dumps([ALPACA[0], {"instruction": "Count.", "output": "one two " * 300}]))
    found = {}
    for choice in ("cut", "drop"):
        output = tmp_path / f"{choice}.mindrecord"
        code, _, _ = run_script("llama_preprocess", *flags(source, marked_spm, output, "--long_rows", choice))
        assert code == 0
        counts = counts_of(output)
        found[choice] = (len(read_all(output)["labels"]), counts["cut_samples"], counts["dropped_long_samples"])
    assert found == {"cut": (2, 1, 0), "drop": (1, 0, 1)}


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"


def test_a_template_file_is_an_input(run_script, marked_spm, tmp_path):
    source, template = tmp_path / "a.json", tmp_path / "own.jinja"
    source.write_text(json.dumps(ALPACA[:1]))
    outputs = []
    for text in (TEMPLATE, TEMPLATE.replace(":", ">")):
        template.write_text(text)
        outputs.append(tmp_path / f"{len(outputs)}.mindrecord")
        code, _, err = run_script("llama_preprocess", *flags(source, marked_spm, outputs[-1], "--format", template))
        assert code == 0, err
    tokenizer = load_tokenizer(marked_spm)
    ids = read_all(outputs[0])["input_ids"][0]
    question = tokenizer.encode("user:Add the numbers.\n1 2")
    assert ids[: len(question) + 3].tolist() == [1, *question, 2, 1]
    assert not np.array_equal(ids, read_all(outputs[1])["input_ids"][0])
    manifests = [json.loads(o.with_name(o.name + ".manifest.json").read_text()) for o in outputs]
    assert [m["inputs"][1]["name"] for m in manifests] == ["own.jinja"] * 2
    assert manifests[0]["inputs"][1] != manifests[1]["inputs"][1]


def test_the_tokenizers_own_template(run_script, marked_spm, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(marked_spm.read_bytes())
    source = tmp_path / "a.json"
    source.write_text(json.dumps(ALPACA[:1]))
    arguments = flags(source, tmp_path, tmp_path / "o.mindrecord", "--chat_template", "tokenizer")
    code, _, err = run_script("llama_preprocess", *arguments)
    assert code == 2 and "has no chat template" in err
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    code, _, err = run_script("llama_preprocess", *arguments)
    assert code == 0, err
    code, _, err = run_script("transform_dataset", "--input", source, "--output", tmp_path / "t.mindrecord",
                              "--model_file", tmp_path, "--chat_template", "tokenizer", "--num_workers", 1)  # fmt: skip
    assert code == 0, err
    manifests = [json.loads((tmp_path / f"{name}.mindrecord.manifest.json").read_text()) for name in "ot"]
    assert [m["inputs"][1]["name"] for m in manifests] == ["tokenizer_config.json"] * 2
    assert [m["arguments"]["template"] for m in manifests] == [str(tmp_path.resolve())] * 2
    template = "{{ raise_exception('only " + "one turn') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    code, _, err = run_script("llama_preprocess", *arguments)
    assert code == 2
    assert f"{source}:1: row 0: " in err and "refuses this conversation: only one turn" in err


def test_an_unknown_format_is_named(run_script, marked_spm, tmp_path):
    source = tmp_path / "a.json"
    source.write_text(json.dumps(ALPACA))
    code, _, err = run_script(
        "llama_preprocess", *flags(source, marked_spm, tmp_path / "o.mindrecord", "--format", "internml")
    )
    assert code == 2 and "did you mean internlm" in err


# ---- InternLM's flow ----

MMLU = 'Which one?,w,"x, or\ny",y,z,B\n"Another ""one""?",1,2,3,4,A\n'
CMMLU = ",Question,A,B,C,D,Answer\n0,著名民乐,管乐,打击乐,弹拨乐,弦乐,C\n"


def test_csv_to_alpaca_to_records(run_script, marked_spm, tmp_path):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "college_law_dev.csv").write_text(MMLU)
    (tmp_path / "arts.csv").write_text(CMMLU, encoding="utf-8-sig")
    rows_file = tmp_path / "mmlu_alpaca_format.json"
    code, out, err = run_script(
        "mmlu_csv2json", "--input", tmp_path / "mmlu", tmp_path / "arts.csv", "--output", rows_file
    )
    assert code == 0, err
    assert "3 questions of 2 subjects" in out
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    assert [row["output"] for row in rows] == [f"The right option is {letter}." for letter in "BAC"]
    assert "college law" in rows[0]["instruction"] and "B. x, or\ny" in rows[0]["input"]
    assert "著名民乐" in rows_file.read_text(encoding="utf-8")

    rows_file.write_text(json.dumps([*rows, {"instruction": "long " * 300, "input": "", "output": "x"}]))
    code, out, err = run_script(
        "transform_dataset", "--input", rows_file, "--output", f"{tmp_path / 'records'}/", "--num_shards", 2,
        "--model_file", marked_spm, "--seq_length", 300, "--num_workers", 1)  # fmt: skip
    assert code == 0, err
    files = sorted(path.name for path in (tmp_path / "records").glob("*.mindrecord?"))
    assert files == ["mmlu_alpaca_format.mindrecord0", "mmlu_alpaca_format.mindrecord1"]
    tokenizer = load_tokenizer(marked_spm)
    records = read_all(tmp_path / "records")
    assert records["input_ids"].shape == (3, 301)
    texts = learnt_texts(records, tokenizer)
    assert sorted(texts) == sorted(row["output"] for row in rows)
    row = records["input_ids"][0].tolist()
    known = {token.text: token.ids[0] for token in tokenizer.special_tokens}
    assert row[0] == 1 and known["<eoh>"] in row and known["<eoa>"] in row
    assert tokenizer.decode(row[: row.index(known["<eoh>"])]).startswith("<|User|>:The following question about")
    assert "dropped long samples 1" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,w,x,y,z,E\n", ":1: the answer is 'E', and must be one of A, B, C, D"),
        (f"{MMLU}q,w,x,y,A\n", ":4: 5 columns"),
        (CMMLU.replace(",D,", ",E,"), ":1: has no column d"),
        (f"{CMMLU}1, ,1,2,3,4,A\n", ":3: the question is empty"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(run_script, tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    code, _, err = run_script("mmlu_csv2json", "--input", tmp_path / "a.csv", "--output", tmp_path / "o.json")
    assert code == 2
    assert f"{tmp_path / 'a.csv'}{message}" in err
    assert not (tmp_path / "o.json").exists()


def test_csv_files_of_one_subject_are_all_converted(run_script, tmp_path):
    for part in ("dev", "test"):
        (tmp_path / f"college_law_{part}.csv").write_text(MMLU)
    code, out, err = run_script("mmlu_csv2json", "--input", tmp_path, "--output", tmp_path / "o.json")
    assert code == 0, err
    assert "4 questions of 1 subjects" in out


def test_transform_dataset_names_the_flag_of_a_missing_tokenizer(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_LLM_TOKENIZERS", str(tmp_path))
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    code, _, err = run_script("transform_dataset", "--input", tmp_path / "a.json", "--output", f"{tmp_path}/")
    assert code == 2
    assert "--model_file internlm: neither a file nor a tokenizer" in err


def test_transform_dataset_refuses_rows_of_another_format(run_script, marked_spm, tmp_path):
    source = tmp_path / "a.json"
    source.write_text(json.dumps([ALPACA[0], {"src": "a", "tgt": "b"}]))
    code, _, err = run_script(
        "transform_dataset", "--input", source, "--output", f"{tmp_path}/", "--model_file", marked_spm)  # fmt: skip
    assert code == 2
    assert f"{source}:1: row 1: has no key 'instruction'" in err
