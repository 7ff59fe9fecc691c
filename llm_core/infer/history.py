"""A conversation as the token ids that a model continues."""

from __future__ import annotations

from llm_core.errors import UserError
from llm_core.text import Tokenizer
from llm_core.text.templates import conversation_template, render_rounds

PLAIN = "none"


class History:
    """The rounds so far (message, answer), written by a fastchat template, or as plain text ("none")."""

    def __init__(self, template: str, rounds: list[tuple[str, str]] | None = None) -> None:
        """UserError for a template that fastchat does not have."""
        self.template = template
        self.rounds = rounds if rounds is not None else []
        self._conversation = None if template == PLAIN else conversation_template(template)
        if self._conversation is not None:
            self._conversation.messages = []  # some templates come with an example conversation

    def add(self, message: str, answer: str) -> None:
        """Remember a round. A template writes its own spaces around an answer; plain text keeps the answer's."""
        self.rounds.append((message, answer if self._conversation is None else answer.strip()))

    def ids(self, message: str, tokenizer: Tokenizer) -> list[int]:
        """bos, each round with an eos behind its answer, and `message` up to where the answer begins.

        This is how llama_preprocess.py writes conversations for training.
        """
        if self._conversation is None:
            return tokenizer.encode_prompt("\n".join([f"{asked}{answer}" for asked, answer in self.rounds] + [message]))
        rendered = render_rounds(self._conversation, [*self.rounds, (message, "")])
        ids = tokenizer.encode("", bos=True)
        for prompt, answer in rendered[:-1]:
            ids += tokenizer.encode(prompt + answer, eos=True)
        return ids + tokenizer.encode(rendered[-1][0])

    def fit(self, message: str, tokenizer: Tokenizer, context: int, room: int) -> tuple[list[int], int]:
        """`ids(message)`, after dropping the oldest rounds until `room` tokens of the `context` stay free.

        Returns the ids and the number of dropped rounds. UserError if the message alone is too long.
        """
        dropped = 0
        while len(ids := self.ids(message, tokenizer)) + room > context:
            if not self.rounds:
                if len(ids) < context:
                    break
                raise UserError(f"this message has {len(ids)} tokens, and the model's context is {context}: shorten it")
            del self.rounds[0]
            dropped += 1
        return ids, dropped

    def stop_strings(self) -> list[str]:
        """What ends an answer besides eos: the template's own marks, and the model speaking as the user."""
        conversation = self._conversation
        if conversation is None:
            return []
        marks = conversation.stop_str if isinstance(conversation.stop_str, list) else [conversation.stop_str]
        return [mark for mark in (*marks, f"{conversation.roles[0]}:") if mark]
