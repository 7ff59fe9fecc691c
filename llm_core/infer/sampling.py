"""What a user may ask of a generation, and which of the search modes that comes to.

    plain         num_beams 1: greedy, or drawn with do_sample
    beam          num_beams 2 and more: beam search, or beam sample with do_sample
    group         num_beam_groups 2 and more: diverse beam search
    constrained   force_words or force_words_ids: beam search for answers that hold them
    contrastive   penalty_alpha above 0: the likeliest of top_k candidates that is least like what stands there
    assisted      assistant: a small model guesses ahead, the model itself decides

Names, defaults and refusals are those of Hugging Face transformers; each search has a module of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from llm_core.config.tree import nearest_origin
from llm_core.errors import UserError

if TYPE_CHECKING:
    from llm_core.config import LoadedConfig
    from llm_core.infer.generate import Generator

Mode = Literal["plain", "beam", "group", "constrained", "contrastive", "assisted"]


@dataclass(frozen=True)
class SamplingParams:
    """The settings of a generation. The names are MindFormers' and Hugging Face's.

    max_new_tokens counts the answer alone and wins over max_length, which counts prompt and answer together
    (MindFormers' max_decode_length is the same thing under an older name).
    """

    do_sample: bool = False
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    no_repeat_ngram_size: int = 0  # 0: off
    bad_words_ids: Sequence[Sequence[int]] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0  # taken off a token for each beam of an earlier group that chose it
    length_penalty: float = 1.0  # a beam's score is its log probability / length ** length_penalty
    early_stopping: bool | Literal["never"] = False  # True: as soon as num_beams answers are there
    penalty_alpha: float = 0.0  # 0: off
    num_assistant_tokens: int = 5  # guessed at a time
    force_words: Sequence[str | Sequence[str]] = ()  # texts; one of several where a list stands
    force_words_ids: Sequence[Sequence[int] | Sequence[Sequence[int]]] = ()
    # called with the prompt's number and the row's token ids, it returns the ids that may come next
    prefix_allowed_tokens_fn: Callable[[int, list[int]], Sequence[int]] | None = None
    assistant: Generator | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("temperature", self.temperature >= 0, "must not be negative; 0 is greedy, 1 changes nothing"),
            ("top_k", self.top_k >= 0, "must not be negative; 0 turns it off"),
            ("top_p", 0 <= self.top_p <= 1, "must be within 0 and 1; 1 turns it off"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be above 0; 1 turns it off"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "must not be negative; 0 turns it off"),
            ("bad_words_ids", _are_words(self.bad_words_ids), "must be a list of lists of token ids, none empty"),
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens > 0, "must be at least 1"),
            ("max_length", self.max_length is None or self.max_length > 0, "must be at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "must not be negative; 0 turns it off"),
            ("min_length", self.min_length >= 0, "must not be negative; 0 turns it off"),
            ("num_return_sequences", self.num_return_sequences >= 1, "must be at least 1"),
            ("stop_strings", all(self.stop_strings), "must not hold an empty string: every text contains it"),
            ("num_beams", self.num_beams >= 1, "must be at least 1"),
            ("num_beam_groups", self.num_beam_groups >= 1, "must be at least 1"),
            ("diversity_penalty", self.diversity_penalty >= 0, "must not be negative; 0 turns it off"),
            ("early_stopping", self.early_stopping in (True, False, "never"), 'must be True, False or "never"'),
            ("penalty_alpha", 0 <= self.penalty_alpha <= 1, "must be within 0 and 1; 0 turns it off"),
            ("num_assistant_tokens", self.num_assistant_tokens >= 1, "must be at least 1"),
            (
                "force_words_ids",
                all(entry and (_are_words(entry) or _are_words([entry])) for entry in self.force_words_ids),
                "must be a list of words (lists of token ids) and of lists of words, none empty",
            ),
        ):
            if not ok:
                raise UserError(f"{name} {getattr(self, name)!r}: {rule}")
        self._refuse_mixtures()

    def _refuse_mixtures(self) -> None:
        """Raise UserError for settings that do not go together."""
        sampled, answers = not self.greedy, self.num_return_sequences
        forced = bool(self.force_words or self.force_words_ids)
        for wrong, why in (
            (
                1 < self.num_beams < answers,
                f"num_return_sequences {answers} with num_beams {self.num_beams}: a beam search has no more answers "
                "than beams; raise num_beams",
            ),
            (
                self.num_beams == 1 < answers and not sampled,
                f"num_return_sequences {answers} needs sampling: greedy search has one answer (set do_sample True and "
                f"a temperature above 0, or num_beams {answers})",
            ),
            (
                self.num_beams % self.num_beam_groups,
                f"num_beam_groups {self.num_beam_groups}: num_beams {self.num_beams} is no multiple of it",
            ),
            *(
                (
                    self.num_beams == 1 and getattr(self, name) != getattr(SamplingParams, name),
                    f"{name} {getattr(self, name)} is of a search with beams, and num_beams is 1: it would do nothing; "
                    f"set num_beams to 2 or more, or {name} to {getattr(SamplingParams, name)}",
                )
                for name in ("length_penalty", "early_stopping")
            ),
            (
                self.num_beam_groups > 1 and not self.diversity_penalty,
                f"num_beam_groups {self.num_beam_groups} with diversity_penalty 0: all groups would find the same; set "
                "diversity_penalty above 0, for instance 1.0",
            ),
            (
                self.diversity_penalty and self.num_beam_groups == 1,
                f"diversity_penalty {self.diversity_penalty} is between groups of beams; set num_beam_groups above 1",
            ),
            (
                self.num_beam_groups > 1 and sampled,
                f"num_beam_groups {self.num_beam_groups}: diverse beam search does not sample; set do_sample False",
            ),
            (
                forced and self.num_beams == 1,
                "force_words: words are forced by a beam search; set num_beams to 2 or more",
            ),
            (forced and sampled, "force_words: constrained beam search does not sample; set do_sample False"),
            (forced and self.num_beam_groups > 1, "force_words do not go with num_beam_groups; set that to 1"),
            (
                self.penalty_alpha and (self.num_beams > 1 or sampled),
                f"penalty_alpha {self.penalty_alpha}: contrastive search neither samples nor has beams; set do_sample "
                "False and num_beams 1",
            ),
            (
                self.penalty_alpha and self.top_k < 2,
                f"penalty_alpha {self.penalty_alpha} with top_k {self.top_k}: contrastive search chooses among top_k "
                "candidates; set top_k to 2 or more, for instance 4",
            ),
        ):
            if wrong:
                raise UserError(why)
        if self.assistant is not None:
            self.refuse_assistant()

    def refuse_assistant(self) -> None:
        """Raise UserError if these settings do not go with an assistant."""
        if self.num_beams > 1 or self.penalty_alpha or self.num_return_sequences > 1:
            raise UserError(
                "assistant: only greedy search and sampling of one answer a prompt can be assisted; set num_beams and "
                "num_return_sequences to 1 and penalty_alpha to 0, or leave the assistant out"
            )

    @property
    def greedy(self) -> bool:
        """True if nothing is drawn (do_sample False, or temperature 0)."""
        return not self.do_sample or self.temperature == 0

    @property
    def mode(self) -> Mode:
        """Which search these settings ask for."""
        if self.force_words or self.force_words_ids:
            return "constrained"
        if self.num_beam_groups > 1:
            return "group"
        if self.num_beams > 1:
            return "beam"
        if self.penalty_alpha:
            return "contrastive"
        return "plain" if self.assistant is None else "assisted"

    def new_tokens(self, prompt_length: int, max_position: int) -> int:
        """The number of tokens that may be written after a prompt of `prompt_length` tokens.

        Raises UserError if the prompt fills the model's context (`max_position` tokens), or if max_new_tokens does
        not fit behind it. A max_length beyond the context is cut to it, as upstream does.
        """
        if prompt_length >= max_position:
            raise UserError(
                f"the prompt has {prompt_length} tokens and the model's context is {max_position} "
                "(max_position_embedding): shorten the prompt"
            )
        if self.max_new_tokens is not None:
            if prompt_length + self.max_new_tokens > max_position:
                raise UserError(
                    f"the prompt's {prompt_length} tokens and max_new_tokens {self.max_new_tokens} exceed the model's "
                    f"context of {max_position} (max_position_embedding): set max_new_tokens to "
                    f"{max_position - prompt_length} or less, or shorten the prompt"
                )
            return self.max_new_tokens
        total = max_position if self.max_length is None else min(self.max_length, max_position)
        if total <= prompt_length:
            raise UserError(
                f"the prompt has {prompt_length} tokens, and max_length (max_decode_length) {self.max_length} counts "
                "prompt and answer together: raise it, or set max_new_tokens"
            )
        return total - prompt_length


def _are_words(value: Any) -> bool:
    """Whether it is a list of lists of token ids, none of them empty."""
    return isinstance(value, list | tuple) and all(
        isinstance(word, list | tuple) and len(word) > 0 and all(isinstance(id_, int) and id_ >= 0 for id_ in word)
        for word in value
    )


def sampling_params(loaded: LoadedConfig) -> SamplingParams:
    """The generation keys of a run file's model.model_config as SamplingParams.

    max_length wins over max_decode_length, and max_new_tokens over both. The assistant is loaded by `infer.load`; here
    only the settings are refused that do not go with one. UserError says where the setting was written that it names.
    """
    try:
        return _sampling_params(loaded.config.model.config)
    except UserError as error:
        key = re.match(r"\w*", str(error))[0]
        raise UserError(f"{nearest_origin(loaded.tree, f'model.model_config.{key}').where}: {error}") from None


def _sampling_params(model_config: Any) -> SamplingParams:
    params = SamplingParams(
        do_sample=bool(model_config.do_sample),
        temperature=_default(model_config.temperature, 1.0),
        top_k=_default(model_config.top_k, 0),
        top_p=_default(model_config.top_p, 1.0),
        repetition_penalty=_default(model_config.repetition_penalty, 1.0),
        no_repeat_ngram_size=_default(model_config.no_repeat_ngram_size, 0),
        bad_words_ids=model_config.bad_words_ids or (),
        max_new_tokens=model_config.max_new_tokens,
        max_length=_default(model_config.max_length, model_config.max_decode_length),
        min_new_tokens=_default(model_config.min_new_tokens, 0),
        min_length=_default(model_config.min_length, 0),
        num_return_sequences=_default(model_config.num_return_sequences, 1),
        stop_strings=tuple(model_config.stop_strings or ()),
        num_beams=_default(model_config.num_beams, 1),
        num_beam_groups=_default(model_config.num_beam_groups, 1),
        diversity_penalty=_default(model_config.diversity_penalty, 0.0),
        length_penalty=_default(model_config.length_penalty, 1.0),
        early_stopping=_default(model_config.early_stopping, False),
        penalty_alpha=_default(model_config.penalty_alpha, 0.0),
        num_assistant_tokens=_default(model_config.num_assistant_tokens, 5),
        force_words=model_config.force_words or (),
        force_words_ids=model_config.force_words_ids or (),
    )
    if model_config.assistant:
        params.refuse_assistant()
    return params


def _default(value, default):
    return default if value is None else value
