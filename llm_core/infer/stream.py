"""From token ids to text that may be shown at once: whole characters, right spaces, stop strings cut off."""

from __future__ import annotations

from collections.abc import Sequence

from llm_core.text import Tokenizer


class TextStream:
    """The text of one answer while it grows.

    The tokenizer's stream is first fed the prompt, because a SentencePiece word carries its space in front: only so
    does the answer begin with the space that belongs between it and the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self.text = ""  # the answer as far as it has been handed out
        self.stopped = False  # a stop string has come; it and what follows it are not part of the text
        self._held = ""  # the end of the answer, which may be the beginning of a stop string
        self._stop_strings = tuple(stop_strings)
        self._decoder = tokenizer.stream()
        for token in prompt_ids:
            self._decoder.push(token)

    def push(self, token: int) -> str:
        """Take the next token; return the text that can be shown now (often, but not always, that token's)."""
        return self._take(self._decoder.push(int(token)))

    def finish(self) -> str:
        """There are no more tokens: return what was held back."""
        shown = self._take(self._decoder.flush())
        if not self.stopped:
            self.text += self._held
            shown += self._held
        self._held = ""
        return shown

    def _take(self, piece: str) -> str:
        if self.stopped:
            return ""
        held = self._held + piece
        ends = [held.find(stop) for stop in self._stop_strings if stop in held]
        if ends:
            self.stopped = True
            shown, self._held = held[: min(ends)], ""
        else:
            keep = max((_overlap(held, stop) for stop in self._stop_strings), default=0)
            shown, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
