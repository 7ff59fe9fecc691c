"""The result files: MindFormers' form, ours beside it, and nothing half-written."""

import ast
import json

import numpy as np
import pytest

from llm_core.errors import EnvironmentFault
from llm_core.infer.complete import Completion
from llm_core.infer.results import prepare_output_dir, write_answers, write_results


def completion(prompt, text, sequence=0):
    return Completion(prompt, text, "eos", 3, (5, 6, 2), 7, sequence)


def test_both_files(tmp_path):
    folder = prepare_output_dir(tmp_path / "new" / "out")
    path = write_results(folder, [[completion("I 'love'", ' "it"\n')], [completion("é", "a"), completion("é", "b", 1)]])
    assert path == folder / "text_generation_result.txt"
    assert ast.literal_eval(path.read_text(encoding="utf-8")) == [
        {"text_generation_text": ["I 'love' \"it\"\n"]},
        {"text_generation_text": ["éa", "éb"]},
    ]
    lines = [json.loads(line) for line in (folder / "text_generation_result.jsonl").read_text("utf-8").splitlines()]
    assert [(line["prompt"], line["text"], line["sequence"]) for line in lines] == [
        ("I 'love'", ' "it"\n', 0), ("é", "a", 0), ("é", "b", 1),
    ]  # fmt: skip
    assert lines[0] | {"prompt": "", "text": ""} == {
        "prompt": "", "text": "", "prompt_tokens": 3, "new_tokens": 3, "finish_reason": "eos", "seed": 7, "sequence": 0,
    }  # fmt: skip
    assert sorted(file.name for file in folder.iterdir()) == [
        "text_generation_result.jsonl", "text_generation_result.txt",
    ]  # fmt: skip


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="choose another --output_dir"):
        prepare_output_dir(tmp_path / "file" / "out")


def test_a_failed_write_leaves_no_file(tmp_path):
    (tmp_path / "text_generation_result.jsonl").mkdir()
    with pytest.raises(EnvironmentFault, match="cannot write the results"):
        write_results(tmp_path, [[completion("a", "b")]])
    assert [file.name for file in tmp_path.iterdir()] == ["text_generation_result.jsonl"]


def test_answers_as_an_array_and_readable(tmp_path):
    results = [[completion("q1", " one")], [completion("q2", "天空\n")]]
    npy, readable = write_answers(tmp_path / "results.npy", results)
    assert np.load(npy).tolist() == [" one", "天空\n"]
    assert json.loads(readable.read_text(encoding="utf-8")) == [
        {"prompt": "q1", "answer": " one"}, {"prompt": "q2", "answer": "天空\n"}]  # fmt: skip
    write_answers(npy, [[completion("q", "a"), completion("q", "b", 1)]] * 3)
    assert np.load(npy).shape == (3, 2)
    (text,) = write_answers(tmp_path / "results.txt", results)
    assert "'q1 one'" in text.read_text(encoding="utf-8")
