"""--predict_data: words, and files of words; every bad file named with its line."""

import json

import pytest

from llm_core.errors import UserError
from llm_core.infer.prompts import read_prompts


def test_words_stay_as_they_were_typed():
    words = ["Say \"hi\" to  'all'", "", "a" * 5000, "nul\0byte", "see notes.txt please"]
    assert read_prompts(words) == words
    assert read_prompts("one string") == ["one string"]


def test_files_stand_for_the_prompts_in_them(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffIch heiße\r\n\r\n  two \n".encode())
    (tmp_path / "b.json").write_text('["one\\ntwo", "three"]')
    (tmp_path / "c.jsonl").write_text('"four"\n\n"five"\n')
    (tmp_path / "plain").write_text("six")
    names = [str(tmp_path / name) for name in ("a.txt", "b.json", "c.jsonl", "plain")]
    expected = ["Ich heiße", "  two ", "one\ntwo", "three", "four", "five", "six"]
    assert read_prompts([*names, "seven"]) == [*expected, "seven"]
    (tmp_path / "d.jsonl").write_text('"a\u2028b"\r\n"c\u2029d\x85e"\r\n', encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / "d.jsonl")) == ["a\u2028b", "c\u2029d\x85e"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\n \n", "a.txt: the file holds no prompt"),
        ("a.txt", b"fine\nna\xefve\n", r"a.txt:2: not UTF-8 text \(byte 0xef\)"),
        ("a.json", b'["one",\n "two"\n', "a.json:3: malformed JSON"),
        ("a.json", b'{"one": 1}', "a.json: must hold a list"),
        ("a.json", b'["one", 2]', "a.json: item 1: a prompt is a JSON string .*, not int"),
        ("a.jsonl", b'"one"\n\n{"two"\n', "a.jsonl:3: malformed JSON"),
        ("a.jsonl", b'"one"\n["two"]\n', "a.jsonl:2: a prompt is a JSON string .*, not list"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts([str(tmp_path / name)])


def test_alpaca_rows_are_prompts(tmp_path):
    rows = [{"instruction": "写诗", "input": ""}, {"instruction": "Add", "input": "1 2", "output": "3"}, "plain"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.json", "a.jsonl"):
        assert read_prompts([str(tmp_path / name)], "internlm") == ["写诗", "Add\n1 2", "plain"]
        first, second, third = read_prompts([str(tmp_path / name)])
        assert first.endswith("### Instruction:\n写诗\n\n### Response:") and "Input" not in first
        assert second.endswith("### Input:\n1 2\n\n### Response:") and third == "plain"
    (tmp_path / "b.json").write_text('[{"instruction": 1}]')
    (tmp_path / "c.json").write_text('["x", {"question": "y"}]')
    for name, message in (("b.json", "item 0: 'instruction' must be a string"), ("c.json", "item 1: .*without")):
        with pytest.raises(UserError, match=message):
            read_prompts([str(tmp_path / name)])


def test_a_missing_file_is_no_prompt(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts([str(tmp_path / "missing.txt")])
    with pytest.raises(UserError, match="--predict_data"):
        read_prompts([])


def test_a_folder_is_no_prompt(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_prompts(str(tmp_path))
