"""Text in, text out: a tokenizer around the Generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_core.errors import UserError
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.stream import TextStream
from llm_core.text import Tokenizer

if TYPE_CHECKING:
    from llm_core.infer.generate import Generation, Generator

DEFAULT_BATCH = 8


@dataclass(frozen=True)
class Completion:
    """One answer to one prompt."""

    prompt: str
    text: str  # the answer alone, as it follows the prompt; cut before a stop string
    finish_reason: str  # eos | length | stop | interrupted
    prompt_tokens: int
    token_ids: tuple[int, ...]  # the new tokens, also those of a stop string
    seed: int  # this prompt alone with this seed gives this answer again
    sequence: int  # which of the prompt's num_return_sequences, from 0


class Completer:
    """A model and its tokenizer, ready to continue texts."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer) -> None:
        self.generator = generator
        self.tokenizer = tokenizer

    def encode(self, prompts: Sequence[str], params: SamplingParams) -> list[list[int]]:
        """The prompts' ids; UserError names the first prompt that leaves no room for its answer."""
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            try:
                params.new_tokens(len(prompt_ids), self.generator.spec.max_position)
            except UserError as error:
                shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
                raise UserError(f"prompt {shown!r}: {error}") from None
        return ids

    def complete(
        self,
        prompts: Sequence[str],
        params: SamplingParams,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        on_text: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> Iterator[list[Completion]]:
        """Continue each of `prompts`; yields, in order, one list of num_return_sequences completions a prompt.

        batch_size: prompts a batch (default: up to 8). on_text is given the text of the first prompt's first
        answer while it grows, for showing one answer live. After interrupted() said yes, the batch at work is yielded
        as far as it came, and no other is begun. Prompts are tokenized, and refused, before anything is generated.
        """
        ids = self.encode(prompts, params)
        batch_size = batch_size or min(DEFAULT_BATCH, len(prompts))
        for first in range(0, len(prompts), batch_size):
            if interrupted is not None and interrupted():
                return
            batch = slice(first, first + batch_size)
            yield from self.complete_ids(
                prompts[batch],
                ids[batch],
                params,
                seed=seed + first,
                batch_size=batch_size,
                on_text=on_text if first == 0 else None,
                interrupted=interrupted,
            )

    def complete_ids(
        self,
        prompts: Sequence[str],
        ids: Sequence[list[int]],
        params: SamplingParams,
        *,
        seed: int = 0,
        batch_size: int = 1,
        on_text: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> list[list[Completion]]:
        """As `complete`, for one batch that is tokenized already; the texts `prompts` are only carried along."""
        per_prompt = params.num_return_sequences
        streams = [TextStream(self.tokenizer, row, params.stop_strings) for row in ids for _ in range(per_prompt)]

        def take(row: int, token: int) -> bool:
            text = streams[row].push(token)
            if row == 0 and text and on_text is not None:
                on_text(text)
            return streams[row].stopped

        rows = batch_size * per_prompt
        answers = self.generator.generate(ids, params, seed, take, rows=rows, interrupted=interrupted)
        for row, stream in enumerate(streams):
            rest = stream.finish()
            if row == 0 and rest and on_text is not None:
                on_text(rest)
        completions = [
            _completion(prompts[row // per_prompt], answer, stream)
            for row, (answer, stream) in enumerate(zip(answers, streams, strict=True))
        ]
        return [completions[row : row + per_prompt] for row in range(0, len(completions), per_prompt)]


def _completion(prompt: str, answer: Generation, stream: TextStream) -> Completion:
    return Completion(
        prompt=prompt,
        text=stream.text,
        finish_reason="stop" if stream.stopped else answer.finish_reason,
        prompt_tokens=len(answer.prompt_ids),
        token_ids=tuple(answer.token_ids),
        seed=answer.seed,
        sequence=answer.sequence,
    )
