"""A conversation as the token ids that a model continues."""

from __future__ import annotations

from llm_core.errors import UserError
from llm_core.text.chat import PLAIN, ChatFormat, part_ids


class History:
    """The rounds so far (message, answer), written by a chat format.

    Under the format none, rounds and message are one running text, which the model continues.
    """

    def __init__(self, format: ChatFormat, rounds: list[tuple[str, str]] | None = None) -> None:
        self.format = format
        self.rounds = rounds if rounds is not None else []

    def add(self, message: str, answer: str) -> None:
        """Remember a round. A format writes its own spaces around an answer; plain text keeps the answer's."""
        self.rounds.append((message, answer if self.format.name == PLAIN else answer.strip()))

    def ids(self, message: str) -> list[int]:
        """The rounds, and `message` up to where the answer begins, as llama_preprocess.py writes them for training."""
        tokenizer = self.format.tokenizer
        if self.format.name == PLAIN:
            return tokenizer.encode_prompt("\n".join([f"{asked}{answer}" for asked, answer in self.rounds] + [message]))
        messages = []
        for asked, answer in self.rounds:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return part_ids(self.format.prompt([*messages, {"role": "user", "content": message}]), tokenizer)

    def fit(self, message: str, context: int, room: int) -> tuple[list[int], int]:
        """`ids(message)`, after dropping the oldest rounds until `room` tokens of the `context` stay free.

        Returns the ids and the number of dropped rounds. UserError if the message alone is too long.
        """
        dropped = 0
        while len(ids := self.ids(message)) + room > context:
            if not self.rounds:
                if len(ids) < context:
                    break
                raise UserError(f"this message has {len(ids)} tokens, and the model's context is {context}: shorten it")
            del self.rounds[0]
            dropped += 1
        return ids, dropped
