"""Prompt templates against fastchat itself, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fastchat.conversation import get_conv_template

from llm_core.errors import UserError
from llm_core.text.templates import alpaca_prompt, conversation_template, render_rounds, squad_prompt

ROUNDS = [("Hello?", "Hi."), ("中文？", "好。"), ("Say </s>", "</s>")]


def test_vicuna_rounds_are_fastchats_prompt():
    conversation = get_conv_template("vicuna_v1.1")
    for question, answer in ROUNDS:
        conversation.append_message("USER", question)
        conversation.append_message("ASSISTANT", answer)
    rendered = render_rounds(conversation_template("vicuna_v1.1"), ROUNDS)
    assert "".join(prompt + answer + "</s>" for prompt, answer in rendered) == conversation.get_prompt()
    assert all(prompt.endswith("ASSISTANT:") for prompt, _ in rendered)
    assert [answer for _, answer in rendered] == [" Hi.", " 好。", " </s>"]
    assert rendered[1][0] == "USER: 中文？ ASSISTANT:"


def test_a_template_is_left_as_it_was_found():
    conversation = conversation_template("vicuna_v1.1")
    assert render_rounds(conversation, ROUNDS) == render_rounds(conversation, ROUNDS)


def test_an_empty_answer_is_no_text():
    assert render_rounds(conversation_template("vicuna_v1.1"), [("Hello?", "")])[0][1] == ""


def test_an_unknown_template_is_named():
    with pytest.raises(UserError, match="vicuna_v9: fastchat has no"):
        conversation_template("vicuna_v9")


def test_alpaca_and_squad():
    assert alpaca_prompt("Add {x}", "1").endswith("### Instruction:\nAdd {x}\n\n### Input:\n1\n\n### Response:")
    assert "Input" not in alpaca_prompt("Add")
    head, rest = squad_prompt("A passage.", "A question?")
    assert head.endswith("### Instruction:\nA passage.")
    assert rest == "\n\n### Input:\nA question?\n\n### Response:"


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from llm_core.text import load_tokenizer, templates;"
        "templates.conversation_template('vicuna_v1.1');"
        "heavy = {'torch', 'transformers', 'mindspore', 'fastapi'};"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
