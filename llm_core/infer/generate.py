"""Token ids in, token ids out: batched generation over the cached decoder. Knows nothing of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llm_core.errors import UserError
from llm_core.infer.assisted import assisted_search
from llm_core.infer.batch import Decoders, Timing
from llm_core.infer.beam import BeamSearch, beam_search
from llm_core.infer.constraints import ConstrainedSearch
from llm_core.infer.contrastive import contrastive_search
from llm_core.infer.groups import GroupSearch
from llm_core.infer.request import Generation, Request
from llm_core.infer.sampling import SamplingParams
from llm_core.infer.scores import Sampler
from llm_core.models.decoder import CausalLM
from llm_core.models.spec import DecoderSpec


class Generator:
    """A model, its special ids, and its compiled decoders."""

    def __init__(self, net: CausalLM, spec: DecoderSpec, *, eos_ids: Sequence[int], pad_id: int) -> None:
        """`pad_id` fills padding columns; which id it is changes nothing, and -1 (no such token) will do."""
        self.net = net
        self.spec = spec
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id if 0 <= pad_id < spec.vocab_size else 0
        self.decoders = Decoders(net, spec)

    @property
    def timing(self) -> Timing:
        """Where the time of the calls so far went."""
        return self.decoders.timing

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seed: int | Sequence[int] = 0,
        on_tokens: Callable[[int, int], bool | None] | None = None,
        *,
        rows: int = 0,
        interrupted: Callable[[], bool] | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> list[Generation]:
        """Answer `prompts` (ids, not empty) in one batch; num_return_sequences answers each, in the prompts' order.

        seed: prompt i draws with seed + i, or with its own of a list, so it can be repeated alone. on_tokens(row,
        token) is called for each new token, rows numbered like the result; returning True ends that row. A search with
        beams calls it when it is over, and True cuts the answer. rows: run at least that many rows (idle ones added),
        so that the short last batch of many uses the graphs of the others. interrupted() is asked before every step;
        True ends the generation. stop_ids: end an answer in this call, beside the model's own eos_ids. Raises
        UserError for an empty or too long prompt.
        """
        seeds = [seed + number for number in range(len(prompts))] if isinstance(seed, int) else seed
        answers = [
            Generation(list(prompt), own_seed, sequence)
            for prompt, own_seed in zip(prompts, seeds, strict=True)
            for sequence in range(params.num_return_sequences)
        ]
        limits = [self._limit(answer.prompt_ids, params) for answer in answers]
        if not answers:
            return answers
        self._check_ids(params)
        request = Request(
            decoders=self.decoders,
            params=params,
            eos_ids=frozenset(self.eos_ids) | stop_ids,
            pad_id=self.pad_id,
            prompts=[list(prompt) for prompt in prompts],
            answers=answers,
            limits=limits,
            idle=max(0, rows - len(answers)) // params.num_return_sequences,
            on_tokens=on_tokens,
            interrupted=interrupted,
        )
        _SEARCHES[params.mode](request)
        return answers

    def _limit(self, prompt: list[int], params: SamplingParams) -> int:
        if not prompt:
            raise UserError("an empty prompt, and a tokenizer that adds no bos: there is nothing to continue")
        if min(prompt) < 0 or max(prompt) >= self.spec.vocab_size:
            raise UserError(
                f"the prompt has token ids {min(prompt)}..{max(prompt)}, but the model's vocabulary has "
                f"{self.spec.vocab_size}: the tokenizer does not belong to this model"
            )
        return params.new_tokens(len(prompt), self.spec.max_position)

    def _check_ids(self, params: SamplingParams) -> None:
        """Raise UserError for words that this model has no tokens for, and for an assistant of another vocabulary."""
        if params.force_words:
            raise UserError("force_words holds texts; to a model without its tokenizer give their ids: force_words_ids")
        for name in ("bad_words_ids", "force_words_ids"):
            highest = max(_ids_in(getattr(params, name)), default=0)
            if highest >= self.spec.vocab_size:
                raise UserError(f"{name} holds token {highest}; the model's vocabulary has {self.spec.vocab_size}")
        if params.assistant is not None:
            self._check_assistant(params.assistant)

    def _check_assistant(self, assistant: Generator) -> None:
        if assistant is self:
            raise UserError("assistant: it is the model itself; name a smaller one")
        if assistant.spec.vocab_size != self.spec.vocab_size:
            raise UserError(
                f"assistant: it has {assistant.spec.vocab_size} tokens and the model {self.spec.vocab_size}; an "
                "assistant needs the model's own tokenizer"
            )
        if self.spec.position == "rope" and self.spec.rope.method == "dynamic_ntk":
            raise UserError(
                "assistant: with extend_method DYNAMIC_NTK a token's angles depend on how many are read with it, so "
                "the answer would change; leave the assistant out"
            )


def _ids_in(value: int | Sequence) -> list[int]:
    """The ids in lists of lists, however deep."""
    return [value] if isinstance(value, int) else [id_ for entry in value for id_ in _ids_in(entry)]


def plain_search(request: Request) -> None:
    """Greedy search, or sampling."""
    batch = request.batch()
    logits = batch.read_prompts().logits
    if request.per_prompt > 1:
        logits = np.repeat(logits, request.per_prompt, 0)
        batch.spread(request.per_prompt)
    texts = [request.text(row // request.per_prompt) for row in range(len(request.answers))]
    sampler = Sampler(texts, request.chain, [(answer.seed, answer.sequence) for answer in request.answers])
    alive = list(range(len(texts)))
    tokens = np.full(len(logits), request.pad_id)  # finished and idle rows read on, and nobody looks
    while True:
        tokens[alive] = sampler.choose(logits, alive)
        for row in alive:
            request.accept(row, int(tokens[row]))
        alive = request.unfinished(alive)
        if not alive:
            return
        logits = batch.read(tokens[:, None], len(alive)).logits


_SEARCHES: dict[str, Callable[[Request], None]] = {
    "plain": plain_search,
    "beam": lambda request: beam_search(request, BeamSearch),
    "group": lambda request: beam_search(request, GroupSearch),
    "constrained": lambda request: beam_search(request, ConstrainedSearch),
    "contrastive": contrastive_search,
    "assisted": assisted_search,
}
