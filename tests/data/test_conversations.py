"""Every format of instruction data -> conversations; what is wrong with a row, by file and line."""

from __future__ import annotations

import json

import pytest

from llm_core.data.choices import ChoiceQuestion
from llm_core.data.conversations import FORMATS, alpaca_of_choice, read_conversations
from llm_core.data.detect import detect_format, detect_one_format
from llm_core.data.inputs import read_rows
from llm_core.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def reply(text: str, rank: int | None, *replies: dict, role: str = "assistant", **more) -> dict:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}


TREE = {
    "message_tree_id": "1",
    "prompt": reply(
        "Why?", None,
        reply("second", 1),
        reply("gone", None, deleted=True),
        reply("best", 0, reply("And how?", None, reply("So.", 0), reply("no rank", None), role="prompter")),
        role="prompter",
    ),
}  # fmt: skip

ROWS = [
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
     [user("a"), assistant("b")], 0),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, {"from": "gpt", "value": "hello"},
                                    {"from": "user", "value": "天空"}, {"from": "assistant", "value": "蓝色"},
                                    {"from": "human", "value": "last"}]},
     [system("s"), user("天空"), assistant("蓝色")], 2),
    ("messages", {"messages": [system("s"), user("a"), assistant("b")]}, [system("s"), user("a"), assistant("b")], 0),
    ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3"}, [user("Add\n1 2"), assistant("3")], 0),
    ("alpaca", {"instruction": "写诗", "input": "", "output": "诗"}, [user("写诗"), assistant("诗")], 0),
    ("alpaca", {"system": "s", "history": [["q", "a"]], "instruction": "i", "output": "o"},
     [system("s"), user("q"), assistant("a"), user("i"), assistant("o")], 0),
    ("src_tgt", {"src": "a", "tgt": "b"}, [user("a"), assistant("b")], 0),
    ("src_tgt", {"src": ["a", "c"], "tgt": ["b", "d"]}, [user("a"), assistant("b"), user("c"), assistant("d")], 0),
    ("oasst1", TREE, [user("Why?"), assistant("best"), user("And how?"), assistant("So.")], 0),
    ("oasst1", {"prompt": reply("alone", None, role="prompter")}, [], 1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "messages", "left_out"), ROWS)
def test_rows_become_messages(kind, row, messages, left_out):
    found = FORMATS[kind](row, "f:1")
    assert (found.messages, found.left_out, found.has_empty_turn) == (messages, left_out, False)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("alpaca", {"instruction": "a", "output": " \n"}),
        ("alpaca", {"instruction": "", "output": "b"}),
        ("src_tgt", {"src": ["a", ""], "tgt": ["b", "d"]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}),
    ],
)
def test_an_empty_turn_is_seen(kind, row):
    assert FORMATS[kind](row, "f:1").has_empty_turn


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("messages", {"messages": [user("a"), user("b")]}, "turn 1 is the user's, and it is the assistant's turn"),
        ("messages", {"messages": [user("a"), user("b"), assistant("c")]},
         "turn 1 is the user's, and it is the assistant's turn"),
        ("messages", {"messages": [user("a"), user("b"), user("c")]}, "turn 1 is the user's"),
        ("messages", {"messages": [system("s"), assistant("a"), user("b"), user("c"), assistant("d")]},
         "turn 3 is the user's"),
        ("messages", {"messages": [user("a"), assistant("b"), assistant("c")]}, "turn 2 is the assistant's"),
        ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "'role' must be 'user' or 'assistant'"),
        ("messages", {"text": "x"}, "has no key 'messages'"),
        ("sharegpt", {"instruction": "x"}, "give --dataset_type alpaca"),
        ("alpaca", {"instruction": "a"}, "has no key 'output'"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, "'history' 0 must be a list of a question"),
        ("alpaca", "text", "must be an object"),
        ("src_tgt", {"src": ["a", "b"], "tgt": ["c"]}, "'src' has 2 turns and 'tgt' 1"),
        ("src_tgt", {"src": [], "tgt": []}, "'src' has 0 turns"),
        ("src_tgt", {"src": "a"}, "has no key 'tgt'"),
        ("src_tgt", {"src": ["a", 3], "tgt": ["b", "c"]}, "turn 1: 'src' must be a string"),
        ("oasst1", {"x": 1}, "has no object 'prompt'"),
        ("oasst1", {"prompt": {"text": "x", "role": "robot"}}, "'role' must be 'prompter' or 'assistant'"),
        ("oasst1", {"prompt": {**reply("x", None, role="prompter"), "replies": ["text"]}},
         "message 0: 'replies' must be a list of messages"),
        ("oasst1", {"prompt": {**reply("x", None, role="prompter"), "replies": {"text": "y"}}}, "'replies' must be"),
        ("oasst1", {"prompt": reply("x", None, reply("y", 0), reply("z", "1"), role="prompter")},
         "message 0: the 'rank' of a reply must be a number or null, and is '1'"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(kind, row, message):
    with pytest.raises(UserError, match=message) as raised:
        FORMATS[kind](row, "data.jsonl:7")
    assert str(raised.value).startswith("data.jsonl:7")


def test_single_messages_of_oasst1_become_trees(tmp_path):
    def message(name, parent, text, role="assistant", rank=None):
        return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, "lang": "en"}

    rows = [
        message("1", None, "Why?", "prompter"), message("2", "1", "worse", rank=1),
        message("5", "3", "More?", "prompter"), message("3", "1", "best", rank=0),
        message("4", None, "Hm?", "prompter"), message("6", "5", "Yes."),
    ]  # fmt: skip
    path = tmp_path / "flat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert detect_format(path) == "oasst1"
    trees = read_conversations(path, "oasst1")
    assert trees.lines == [1, 5]
    found = [FORMATS["oasst1"](tree, trees.place(i)) for i, tree in enumerate(trees.values)]
    assert [m["content"] for m in found[0].messages] == ["Why?", "best", "More?", "Yes."]
    assert (found[1].messages, found[1].left_out) == ([], 1)
    for wrong, what in (
        (message("9", "8", "x"), "answers the message '8'"),
        (message("9", ["1"], "x"), "answers the message .'1'."),
        (rows[0], "is in the file twice"),
    ):
        path.write_text("\n".join(map(json.dumps, [*rows, wrong])))
        with pytest.raises(UserError, match=f"flat.jsonl:7: .*{what}"):
            read_conversations(path, "oasst1")


def test_rows_know_their_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n', encoding="utf-8-sig")
    rows = read_rows(path)
    assert rows.values == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert rows.lines == [3, 5, 6]
    assert rows.place(1) == f"{path}:5: row 1"
    path.write_bytes(b'{"a": "one"}\r\n\n{"a": "\xe2\x80\xa8two"}\r\n')
    rows = read_rows(path)
    assert rows.lines == [1, 3] and rows.values[1] == {"a": "\u2028two"}
    assert rows.place(1) == f"{path}:3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1}\n {"a": 2}]', ":2: malformed JSON: Expecting ',' delimiter"),
        ('[{"a": 1},\n]', ":2: malformed JSON"),
        ('[{"a": 1}', "malformed JSON"),
        ('[{"a": 1}]\n]', ":2: malformed JSON: Extra data"),
        ("[]", "has no rows"),
        ('{"a": 1}\n{"a": }', ":2: malformed JSON"),
        ('{"a":\n 1}', "must be a JSON list of rows, and is a dict"),
        ('{"a":\n', ":2: malformed JSON"),
    ],
)
def test_a_file_that_is_no_rows(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError) as raised:
        read_rows(path)
    assert str(raised.value).startswith(str(path)) and message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('[{"conversations": []}]', "sharegpt"), ('{"messages": []}\n', "messages"), ('[\n\n {"src": "a"}]', "src_tgt"),
        ('{"instruction": "a"}', "alpaca"), ('{"message_tree_id": "1", "prompt": {}}', "oasst1"),
        ('{"text": "a"}\n{"text": "b"}', "jsonl"), (" = Title = \n\n Text", "wiki"), ("[1] A note, not JSON", "wiki"),
        ("{ not JSON either", "wiki"), ('{"text": "' + "long " * 20_000 + '"}', "jsonl"),
    ],
)  # fmt: skip
def test_formats_are_told_from_the_first_row(tmp_path, content, kind):
    (tmp_path / "data").write_text(content, encoding="utf-8-sig")
    assert detect_format(tmp_path / "data") == kind


def test_what_cannot_be_told(tmp_path):
    squad, chats, text = tmp_path / "squad.json", tmp_path / "chats.json", tmp_path / "a.txt"
    squad.write_text('{"data": [],\n "version": 1}')
    chats.write_text('[{"messages": []}]')
    text.write_text("Text")
    with pytest.raises(UserError, match="use squad_data_process.py"):
        detect_format(squad)
    (tmp_path / "a.csv").write_text("q,a")
    with pytest.raises(UserError, match="a.csv: a table; mmlu_csv2json.py"):
        detect_format(tmp_path / "a.csv")
    with pytest.raises(UserError, match="chats.json looks like messages, and .*a.txt like wiki"):
        detect_one_format([chats, text])


def test_choices_become_instructions():
    question = ChoiceQuestion("college_law", "Which?", ("w", "x", "y", "z"), "C", "f:1")
    row = alpaca_of_choice(question)
    assert "college law" in row["instruction"]
    assert row["input"] == "Question: Which?\nA. w\nB. x\nC. y\nD. z"
    assert row["output"] == "The right option is C."
