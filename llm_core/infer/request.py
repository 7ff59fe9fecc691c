"""One call of Generator.generate: what a search works with, and the answers that it fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llm_core.infer.batch import CachedBatch, Decoders
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.scores import ScoreChain, Text


@dataclass
class Generation:
    """One answer: `token_ids` are the new tokens, the end-of-text token included if that is what ended it."""

    prompt_ids: list[int]
    seed: int
    sequence: int  # 0-based, among the request's num_return_sequences
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # eos | length | stop (asked for by on_tokens) | interrupted
    score: float | None = None  # of a beam search: log probability / length ** length_penalty


@dataclass
class Request:
    """The prompts of a batch, their settings and their answers, num_return_sequences for each prompt in turn."""

    decoders: Decoders
    params: SamplingParams
    eos_ids: frozenset[int]
    pad_id: int
    prompts: Sequence[list[int]]
    answers: list[Generation]
    limits: list[int]  # the most tokens of each answer
    idle: int  # prompts that are read along, so that the batch has a shape met before
    on_tokens: Callable[[int, int], bool | None] | None
    interrupted: Callable[[], bool] | None

    def __post_init__(self) -> None:
        self.chain = ScoreChain(self.params, self.eos_ids)

    @property
    def per_prompt(self) -> int:
        """Answers of each prompt."""
        return self.params.num_return_sequences

    def batch(self, more: int = -1) -> CachedBatch:
        """All prompts, idle ones behind them, with room for the longest answer and `more` columns.

        -1 is enough for a search that never reads the last token.
        """
        prompts = [*self.prompts, *[[self.pad_id]] * self.idle]
        return CachedBatch(self.decoders, prompts, max(self.limits) + more, self.pad_id)

    def text(self, number: int) -> Text:
        """A prompt, to be written on."""
        return Text(list(self.prompts[number]), len(self.prompts[number]), number)

    def accept(self, row: int, token: int) -> None:
        """Append `token` to answer `row`, and set its finish_reason if the answer is finished with it."""
        answer = self.answers[row]
        answer.token_ids.append(token)
        stop = self.on_tokens is not None and self.on_tokens(row, token)
        if token in self.eos_ids:
            answer.finish_reason = "eos"
        elif stop:
            answer.finish_reason = "stop"
        elif len(answer.token_ids) == self.limits[row]:
            answer.finish_reason = "length"

    def unfinished(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` that go on; none after an interruption, which marks them."""
        alive = [row for row in rows if not self.answers[row].finish_reason]
        if alive and self.is_interrupted():
            for row in alive:
                self.answers[row].finish_reason = "interrupted"
            return []
        return alive

    def is_interrupted(self) -> bool:
        """Whether the caller wants the generation to end now."""
        return self.interrupted is not None and self.interrupted()
