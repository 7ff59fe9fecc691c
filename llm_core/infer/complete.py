"""Text in, text out: a tokenizer around the Generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from llm_core.errors import UserError
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.stream import TextStream
from llm_core.text import Tokenizer
from llm_core.text.chat import ChatFormat, part_ids

if TYPE_CHECKING:
    from llm_core.infer.generate import Generation, Generator
    from llm_core.parallel.comm import Comm

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
    score: float | None = None  # of a beam search: log probability / length ** length_penalty


class Completer:
    """A model and its tokenizer, ready to continue texts, or with a chat format to answer messages."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        chat_format: ChatFormat | None = None,
        assistant: Generator | None = None,
        comm: Comm | None = None,
    ) -> None:
        """`assistant`: guesses ahead for the generator, where a call names no other. comm: with the other ranks, among
        whose replicas `complete` shares out the batches; all ranks then call it together."""
        self.generator = generator
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.assistant = assistant
        self.comm = comm

    def encode(self, prompts: Sequence[str], params: SamplingParams) -> list[list[int]]:
        """The prompts' ids; UserError names the first prompt that leaves no room for its answer."""
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            try:
                params.new_tokens(len(prompt_ids), self.generator.spec.max_position)
            except UserError as error:
                shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
                raise UserError(f"prompt {shown!r}: {error}") from None
        return ids

    def shown(self, prompt: str) -> str:
        """The prompt as the model reads it, for people."""
        return prompt if self.chat_format is None else self.chat_format.text(_as_message(prompt))

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.chat_format is None:
            return self.tokenizer.encode_prompt(prompt)
        return part_ids(self.chat_format.prompt(_as_message(prompt)), self.tokenizer)

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

        batch_size: prompts a batch (default: up to 8, and with replicas no more than a batch for each needs). on_text
        is given the text of the first prompt's first answer while it grows, for showing one answer live. After
        interrupted() said yes, the batch at work is yielded as far as it came, and no other is begun. Prompts are
        tokenized, and refused, before anything is generated. With a chat format the completions' prompts are as the
        format writes them.
        """
        ids = self.encode(prompts, params)
        prompts = [self.shown(prompt) for prompt in prompts]
        replicas = 1 if self.comm is None else self.comm.layout.dp
        batch_size = batch_size or min(DEFAULT_BATCH, -(-len(prompts) // replicas)) or 1

        def answers(first: int) -> list[list[Completion]]:
            batch = slice(first, first + batch_size)
            return self.complete_ids(
                prompts[batch],
                ids[batch],
                _counted_from(first, params),
                seed=seed + first,
                batch_size=batch_size,
                on_text=on_text if first == 0 else None,
                interrupted=interrupted,
            )

        for first in range(0, len(prompts), batch_size * replicas):
            stop = interrupted is not None and interrupted()
            if stop if self.comm is None else any(self.comm.of_replicas(stop)):
                return
            yield from answers(first) if self.comm is None else self._of_all(answers, first, batch_size, len(prompts))

    def _of_all(
        self, answers: Callable[[int], list[list[Completion]]], first: int, batch_size: int, end: int
    ) -> list[list[Completion]]:
        """The answers to a batch for each replica, the first of which begins with prompt number `first`."""
        own = first + batch_size * self.comm.place.replica
        found = answers(own) if own < end else []
        parts = self.comm.of_replicas([[asdict(each) for each in prompt] for prompt in found])
        return [
            [Completion(**{**each, "token_ids": tuple(each["token_ids"])}) for each in prompt]
            for part in parts
            for prompt in part
        ]

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
        chat_format: ChatFormat | None = None,
    ) -> list[list[Completion]]:
        """As `complete`, for one batch that is tokenized already; the texts `prompts` are only carried along.

        chat_format: wrote the ids, and says what ends an answer; default: the Completer's.
        """
        params = self._with_ids(params)
        chat_format = chat_format or self.chat_format
        stop_ids = frozenset(chat_format.stop_ids if chat_format else ())
        stop_strings = (*params.stop_strings, *(chat_format.stop_strings if chat_format else ()))
        per_prompt = params.num_return_sequences
        streams = [TextStream(self.tokenizer, row, stop_strings) for row in ids for _ in range(per_prompt)]

        def take(row: int, token: int) -> bool:
            if token in stop_ids:  # a mark of the format, whatever it looks like as text
                return True
            text = streams[row].push(token)
            if row == 0 and text and on_text is not None:
                on_text(text)
            return streams[row].stopped

        rows = batch_size * per_prompt
        answers = self.generator.generate(
            ids, params, seed, take, rows=rows, interrupted=interrupted, stop_ids=stop_ids
        )
        for row, stream in enumerate(streams):
            rest = stream.finish()
            if row == 0 and rest and on_text is not None:
                on_text(rest)
        completions = [
            _completion(prompts[row // per_prompt], answer, stream)
            for row, (answer, stream) in enumerate(zip(answers, streams, strict=True))
        ]
        return [completions[row : row + per_prompt] for row in range(0, len(completions), per_prompt)]

    def _with_ids(self, params: SamplingParams) -> SamplingParams:
        """`params` as the generator takes them: forced words as token ids, and the assistant."""
        if params.force_words:
            words = [self._word_ids(entry) for entry in params.force_words]
            params = replace(params, force_words=(), force_words_ids=[*params.force_words_ids, *words])
        if self.assistant is not None and params.assistant is None:
            params = replace(params, assistant=self.assistant)
        return params

    def _word_ids(self, entry: str | Sequence[str]) -> list:
        if not isinstance(entry, str):
            return [self._word_ids(word) for word in entry]
        ids = self.tokenizer.encode(entry)
        if not ids:
            raise UserError(f"force_words: {entry!r} has no tokens; name a word")
        return ids


def _counted_from(first: int, params: SamplingParams) -> SamplingParams:
    """`params` for a batch that begins with prompt number `first`: prefix_allowed_tokens_fn counts them all."""
    allowed = params.prefix_allowed_tokens_fn
    if allowed is None:
        return params
    return replace(params, prefix_allowed_tokens_fn=lambda number, ids: allowed(first + number, ids))


def _as_message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _completion(prompt: str, answer: Generation, stream: TextStream) -> Completion:
    return Completion(
        prompt=prompt,
        text=stream.text,
        finish_reason="stop" if stream.stopped else answer.finish_reason,
        prompt_tokens=len(answer.prompt_ids),
        token_ids=tuple(answer.token_ids),
        seed=answer.seed,
        sequence=answer.sequence,
        score=answer.score,
    )
