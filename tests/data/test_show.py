"""show-data: what is printed of a record, and what is marked as learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_core.data import show
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.errors import UserError
from llm_core.text import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(spm_model: Path) -> Tokenizer:
    return load_tokenizer(spm_model)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two records: question (not learnt), answer with eos (learnt), padding (id 0, not learnt)."""
    rows = {"input_ids": np.zeros((2, 40), np.int32), "labels": np.full((2, 40), -100, np.int32)}
    for row, (question, answer) in enumerate([("Who is it?", " Größe"), ("And what", " a list")]):
        asked = tokenizer.encode(question, bos=True)
        ids = asked + tokenizer.encode(answer, eos=True)
        rows["input_ids"][row, : len(ids)] = ids
        rows["labels"][row, len(asked) : len(ids)] = ids[len(asked) :]
    path = tmp_path_factory.mktemp("answered") / "qa.mindrecord"
    facts = {"tokenizer": {"path": str(tokenizer.path), "sha256": tokenizer.fingerprint}, "cut": 1}
    with RecordWriter(path, {"input_ids": 40, "labels": 40}, facts) as writer:
        writer.write_rows(rows)
    return path


def test_text_with_marks(answered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show.main([str(answered), "-n", "1"]) == 0
    text = capsys.readouterr().out
    assert "2 records of input_ids [40], labels [40] in 1 file" in text
    assert "  cut: 1" in text and "[[learnt (counted in the loss)]], only read" in text
    assert "<s>Who is it?[[ Größe</s>]]<unk>x" in text
    assert "record 1" not in text


def test_start_and_ids(answered: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    show.main([str(answered), "--start", "1", "--ids"])
    text = capsys.readouterr().out
    assert "--- record 1:" in text and "record 0" not in text
    assert f"{tokenizer.bos_id}:<s> " in text and f"[[{tokenizer.eos_id}:</s>]]" in text
    with pytest.raises(UserError, match="--start 2: .* has records 0 to 1"):
        show.main([str(answered), "--start", "2"])


def test_without_labels_all_but_the_first_token_is_learnt(records: RecordFile, rows: dict[str, np.ndarray]) -> None:
    batch = show.as_batch(records, np.array([3, 4]))
    assert (show.learnt_tokens(batch, -1) == (rows["labels"][3:5] != -100)).all()
    plain = show.learnt_tokens(type(batch)(batch.input_ids, None, batch.record_ids), -1)
    assert plain[:, 1:].all() and not plain[:, 0].any()


def test_colours_on_a_terminal(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    ids = np.array(tokenizer.encode("is a"))
    learnt = np.arange(len(ids)) > 0
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32m" in show.as_text(ids, learnt, tokenizer) and "\033[2m" in show.legend()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in show.as_text(ids, learnt, tokenizer)


def test_a_terminal_gets_no_control_characters(tokenizer: Tokenizer) -> None:
    escape = next(i for i in range(tokenizer.vocab_size) if tokenizer.id_to_piece(i) == "<0x1B>")
    assert show.as_text(np.array([escape]), np.zeros(1, bool), tokenizer) == "\\x1b"


def test_ids_outside_the_vocabulary_are_named_not_fatal(tokenizer: Tokenizer) -> None:
    assert "<600?>" in show.as_text(np.array([5, 600]), np.zeros(2, bool), tokenizer)


def test_no_tokenizer_known(record_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give --tokenizer"):
        show.main([str(record_path)])
    gone = {"tokenizer": {"path": "/nowhere/t.model", "sha256": ""}}
    with RecordWriter(tmp_path / "a.mindrecord", {"input_ids": 3}, gone) as writer:
        writer.write_rows({"input_ids": np.zeros((1, 3), np.int32)})
    with pytest.raises(UserError, match="/nowhere/t.model: the tokenizer of .* is not there"):
        show.main([str(tmp_path)])


def test_another_tokenizer_is_reported(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"tokenizer": {"path": "x", "sha256": "0" * 64}}
    with RecordWriter(tmp_path / "a.mindrecord", {"input_ids": 3}, facts) as writer:
        writer.write_rows({"input_ids": np.ones((1, 3), np.int32)})
    assert show.main([str(tmp_path), "--tokenizer", str(tokenizer.path)]) == 0
    assert "made with another tokenizer" in capsys.readouterr().err
