"""mrpc_process.py: MSR's file, GLUE's tsv and jsonl, the split, what a record holds, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from llm_core.data.batch import Batch, shift
from llm_core.data.mrpc import Pair, pair_text, read_pairs, split_pairs
from llm_core.data.records import RecordFile
from llm_core.text import load_tokenizer

HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
PAIRS = [
    Pair('He called it "odd.', 'He said: "odd.', 1),  # a quotation mark that is never closed
    Pair("The cat sat.", "A dog ran.", 0),
    Pair("It rose 4.4%, to A$4.56.", "It was up 4.4% at A$4.56", 1),
]


def msr_text(pairs: list[Pair]) -> str:
    rows = [f"{pair.label}\t{number}\t{number + 9}\t{pair.first}\t{pair.second}" for number, pair in enumerate(pairs)]
    return "\r\n".join([HEADER, *rows]) + "\r\n"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "msr.txt"
    path.write_bytes(b"\xef\xbb\xbf" + msr_text(PAIRS).encode())
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    records = RecordFile(path)
    return records.read(np.arange(records.num_records))


def run(run_script, source: Path, model: Path, output: Path, *more: object):
    files = ("--input_file", source, "--model_file", model, "--output_file", output)
    return run_script("mrpc_process", *files, "--num_workers", 1, *more)


def test_all_three_forms_are_read_alike(source, tmp_path):
    assert read_pairs(source) == PAIRS
    glue = tmp_path / "train.tsv"
    glue.write_text(msr_text(PAIRS).replace("\r", ""))
    assert read_pairs(glue) == PAIRS
    lines = tmp_path / "train.jsonl"
    rows = [{"sentence1": pair.first, "sentence2": pair.second, "label": pair.label, "idx": 1} for pair in PAIRS]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(lines) == PAIRS


def test_a_record(run_script, source, spm_model, tmp_path):
    output = tmp_path / "mrpc.mindrecord"
    code, out, err = run(run_script, source, spm_model, output, "--max_seq_len", 96)
    assert code == 0 and "Transformed 3 records." in out and "paraphrases 2, others 1" in err
    tokenizer, rows = load_tokenizer(spm_model), read_all(output)
    assert rows["input_ids"].shape == rows["labels"].shape == (3, 97)
    for ids, labels, pair in zip(rows["input_ids"], rows["labels"], PAIRS, strict=True):
        text = [1, *tokenizer.encode("".join(pair_text(pair.first, pair.second)))]
        assert ids.tolist() == text + [0] * (97 - len(text))
        assert np.flatnonzero(labels != -100).tolist() == [len(text)] and labels[len(text)] == pair.label
    # moved by one, as the loader's batches are, each label meets the last token of its text
    batch = Batch(rows["input_ids"], rows["labels"], np.arange(3))
    tokens, labels = shift(batch, pad_token_id=-1)
    assert set(tokens[labels >= 0]) == {tokenizer.encode("\nParaphrase:")[-1]}


def test_the_split_is_of_the_seed(run_script, spm_model, tmp_path):
    pairs = [Pair(f"sentence {number}", f"phrase {number}", number % 2) for number in range(50)]
    source = tmp_path / "msr.txt"
    source.write_text(msr_text(pairs))
    assert read_pairs(source) == pairs
    output = tmp_path / "m.mindrecord"
    shares = ("--valid_share", 0.2, "--test_share", 0.1, "--max_seq_len", 48)
    assert run(run_script, source, spm_model, output, *shares)[0] == 0
    sizes = [RecordFile(tmp_path / f"m{name}.mindrecord").num_records for name in ("", "_valid", "_test")]
    assert sizes == [35, 10, 5]
    first, again, other = (split_pairs(pairs, {"valid": 0.2, "test": 0.1}, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(sum(first.values(), []), key=pairs.index) == pairs  # each in one part
    assert first["valid"] == sorted(first["valid"], key=pairs.index)


def test_a_long_pair_is_cut_in_its_longer_sentence(run_script, spm_model, tmp_path):
    pairs = [Pair("word " * 60, "The end is near.", 1), Pair("Short.", "word " * 60, 0)]
    source = tmp_path / "msr.txt"
    source.write_text(msr_text(pairs))
    output = tmp_path / "m.mindrecord"
    code, _, err = run(run_script, source, spm_model, output, "--max_seq_len", 48)
    assert code == 0 and "cut samples 2" in err
    tokenizer, rows = load_tokenizer(spm_model), read_all(output)
    kept_texts = ["The end is near.", "Sentence 1: Short."]
    for ids, labels, kept in zip(rows["input_ids"], rows["labels"], kept_texts, strict=True):
        assert np.flatnonzero(labels != -100).tolist() == [48]
        text = tokenizer.decode(ids[:48].tolist())
        assert kept in text and text.endswith("Paraphrase:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Quality\t#1 ID\t#2 ID\t#1 String\n1\t2\t3\ta\n", r"msr.txt:1: has no column '#2 String' or 'sentence2'"),
        (f"{HEADER}\n1\t2\t3\ta\n", r"msr.txt:2: 4 columns, and the header has 5"),
        (f"{HEADER}\n1\t2\t3\ta\tb\n2\t2\t3\ta\tb\n", r"msr.txt:3: the label is '2', and must be 0 or 1"),
        (f"{HEADER}\n1\t2\t3\ta\t \n", r"msr.txt:2: a sentence is empty"),
        (f"{HEADER}\n", r"a header and no pair"),
        ('{"sentence1": "a", "sentence2": "b", "label": -1}\n', r"msr.txt:1: the label is -1"),
        ('{"sentence1": "a", "sentence2": "b"}\n', r"msr.txt:1: has no column 'Quality' or 'label'"),
        ('{"sentence1": \n', r"msr.txt:1: malformed JSON"),
    ],
)
def test_bad_input(run_script, spm_model, tmp_path, text, message):
    source = tmp_path / "msr.txt"
    source.write_text(text)
    code, _, err = run(run_script, source, spm_model, tmp_path / "m.mindrecord")
    assert code == 2
    assert re.search(message, err)
    assert not list(tmp_path.glob("*.mindrecord*"))


FLAGS = [("--valid_share", 1.0), ("--test_share", 0.01), ("--max_seq_len", 8), ("--seed", -1)]


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags(run_script, source, spm_model, tmp_path, flags):
    code, _, err = run(run_script, source, spm_model, tmp_path / "m.mindrecord", *flags)
    assert code == 2 and "error:" in err
