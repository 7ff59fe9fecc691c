"""The demo's corpus: documents kept apart, pairs in Alpaca's form, a tokenizer laid out like Llama's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make(folder)
    return folder


def make(folder):
    command = [sys.executable, "tools/demo_corpus.py", "--output_dir", str(folder), "--vocab_size", "600"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)


def test_texts_hold_different_paragraphs(folder):
    train, valid = ((folder / name).read_text(encoding="utf-8") for name in ("train.txt", "valid.txt"))
    assert len(train) > 1_000_000 and len(valid) > 50_000
    shared = {part for part in valid.split("\n\n") if len(part) > 200} & set(train.split("\n\n"))
    assert not shared


def test_pairs_have_alpacas_keys_and_cover_the_library(folder):
    pairs = json.loads((folder / "alpaca.json").read_text(encoding="utf-8"))
    assert 1000 < len(pairs) <= 2400
    assert all(set(pair) == {"instruction", "input", "output"} and pair["output"] for pair in pairs)
    questions = " ".join(pair["instruction"] for pair in pairs)
    assert " argparse." in questions and " unittest." in questions


def test_prompts_are_written_as_the_fine_tuning_data_is(folder):
    for prompt in json.loads((folder / "prompts.json").read_text(encoding="utf-8")):
        assert prompt.endswith("### Response: ASSISTANT:")
        assert prompt.count("### Instruction:\n") == 1


def test_tokenizer_is_laid_out_like_llamas(folder):
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.get_piece_size() == 600
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    text = "def naïve(x): return '北京' * 2  # ☃"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # byte fallback


def test_second_run_keeps_what_is_there(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "prompts.json"}
    make(folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "prompts.json"}
    assert not list(folder.glob("*.part"))
