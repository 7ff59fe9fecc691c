"""Prompt templates: fastchat's conversations, Alpaca's and SQuAD's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_core.errors import UserError

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's prompt, ending "### Response:"; without the Input section if `input` is empty."""
    template = _ALPACA_WITH_INPUT if input else _ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def squad_prompt(passage: str, question: str) -> tuple[str, str]:
    """MindFormers' SQuAD prompt in two parts whose sum it is: up to the end of the passage, and the rest."""
    return (
        f"Read the passage and answer the question below.\n\n### Instruction:\n{passage}",
        f"\n\n### Input:\n{question}\n\n### Response:",
    )


def choice_instruction(subject: str, question: str, choices: Sequence[str]) -> tuple[str, str]:
    """A question of MMLU or CMMLU as an instruction and what it is about; `choice_answer` is what it asks for."""
    instruction = (
        f"The following question about {subject.replace('_', ' ')} has one right option among A, B, C and D. "
        "Name it, and begin the answer with 'The right option is'."
    )
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return instruction, f"Question: {question}\n{options}"


def choice_answer(letter: str) -> str:
    """What `choice_instruction` asks for."""
    return f"The right option is {letter}."


def conversation_template(name: str) -> Any:
    """A fresh fastchat Conversation, e.g. "vicuna_v1.1". UserError for an unknown name.

    Only fastchat's one module of templates is imported, which needs nothing but the standard library.
    """
    from fastchat.conversation import conv_templates, get_conv_template

    if name not in conv_templates:
        raise UserError(f"{name}: fastchat has no conversation template of this name; vicuna_v1.1 is one")
    conversation = get_conv_template(name)
    if conversation.sep_style is None:  # a service, whose prompts are not text
        raise UserError(f"{name}: fastchat's template of this name writes no text; take another, such as vicuna_v1.1")
    return conversation


def render_rounds(conversation: Any, rounds: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rounds (what the user says, what the assistant answers) as a template writes them.

    `conversation`: from `conversation_template`, without messages; it is left without messages.
    Each result is a pair (prompt, answer): the prompt ends where the assistant begins to write ("... ASSISTANT:"),
    the answer has its separator in front (" Hello"). An end mark after the answer (vicuna's "</s>") is not in it:
    it is a token, not text. The first prompt begins with the template's system message.
    """
    written = written_rounds(conversation, rounds)
    if not conversation.sep2:
        return written
    return [
        (prompt, text.removesuffix(conversation.sep2) if answer else text)
        for (prompt, text), (_, answer) in zip(written, rounds, strict=True)
    ]


def written_rounds(conversation: Any, rounds: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """As `render_rounds`, with whatever the template writes behind an answer."""
    user, assistant = conversation.roles[:2]
    rendered, done = [], ""
    for question, answer in rounds:
        conversation.append_message(user, question)
        conversation.append_message(assistant, None)
        prompt = conversation.get_prompt()
        conversation.update_last_message(answer)
        full = conversation.get_prompt()
        if not (prompt.startswith(done) and full.startswith(prompt)):
            conversation.messages = []
            raise UserError(f"{conversation.name}: this template rewrites earlier rounds; use vicuna_v1.1")
        rendered.append((prompt[len(done) :], full[len(prompt) :]))
        done = full
    conversation.messages = []
    return rendered
