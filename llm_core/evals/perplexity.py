"""Perplexity on a data set: exp of the mean loss per supervised token.

Two means are in use. Ours weighs every token alike: sum of all token losses / number of all supervised tokens, the
same for any batch size. MindFormers means each batch and then averages the batches, which weighs a short or mostly
padded batch like a full one; that figure is given beside ours, for comparison with upstream's logs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mindspore as ms

from llm_core.data.batch import IGNORED, shift
from llm_core.data.loader import Loader
from llm_core.errors import UserError
from llm_core.models.decoder import CausalLM
from llm_core.models.heads import TokenLoss
from llm_core.report.console import console
from llm_core.runtime import Compiled

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm


@dataclass(frozen=True)
class PerplexityResult:
    """loss in nats a token and ppl = exp(loss), over all tokens; per_batch_*: the mean over batches' means."""

    loss: float
    ppl: float
    tokens: int
    batches: int
    per_batch_loss: float
    per_batch_ppl: float

    def mindformers_line(self) -> str:
        """The line that readers of MindFormers' logs look for."""
        return f"PerplexityMetric = {{'PerplexityMetric': {{'loss': {self.loss}, 'PPL': {self.ppl}}}}}"

    def per_batch_line(self) -> str:
        """Upstream's figure, and what ours was taken over."""
        return (
            f"mean of the {self.batches} batches' means, as MindFormers counts: loss {self.per_batch_loss:.6f}, "
            f"PPL {self.per_batch_ppl:.4f} (above: over all {self.tokens} supervised tokens)"
        )


class Perplexity:
    """Measures `net`, whose weights are shared, not copied: make it once and call `measure` as training goes on.

    One graph is compiled for each batch shape, at its first batch.
    """

    def __init__(
        self, net: CausalLM | Sequence[CausalLM], *, pad_token_id: int, ignore_token_id: int = IGNORED,
        comm: Comm | None = None,
    ) -> None:  # fmt: skip
        """comm: with the ranks that have the other rows of every batch, or other layers: then `net` is this stage's
        pieces."""
        self._pad, self._ignore, self._comm = pad_token_id, ignore_token_id, comm
        nets = net if isinstance(net, Sequence) else [net]
        self._pipeline, self._window = None, 1
        if comm is not None and comm.layout.pp > 1:
            from llm_core.parallel.pipeline import PipelineEvaluator

            self._pipeline, self._window = PipelineEvaluator(nets, comm), 2 * comm.layout.pp
            return
        (net,) = nets
        self._token_loss = Compiled(TokenLoss(net), spec=net.spec, **net.graph_key)

    def measure(self, loader: Loader, desc: str = "evaluate") -> PerplexityResult:
        """One pass over `loader`, in its order of epoch 0. Raises UserError if no token at all is supervised."""
        sums: list[tuple[float, float]] = []
        with console.progress(loader.steps_per_epoch, desc=desc, unit="batch") as bar:
            batches = (shift(batch, self._pad, self._ignore) for batch in loader.epoch(0))
            while window := list(itertools.islice(batches, self._window)):
                sums += self._losses([(ms.Tensor(tokens), ms.Tensor(labels)) for tokens, labels in window])
                loss, tokens = map(math.fsum, zip(*sums, strict=True))
                bar.set_postfix_str(f"loss {loss / max(tokens, 1.0):.4f}", refresh=False)
                bar.update(len(window))
        return summarize(sums if self._comm is None else _of_all_ranks(sums, self._comm))

    def _losses(self, batches: list[tuple[ms.Tensor, ms.Tensor]]) -> list[tuple[float, float]]:
        """(sum of losses, supervised tokens) of each batch."""
        if self._pipeline is not None:
            return self._pipeline.evaluate(batches)
        found = [self._token_loss(tokens, labels) for tokens, labels in batches]
        return [(float(loss.asnumpy()), float(count.asnumpy())) for loss, count in found]


def _of_all_ranks(sums: list[tuple[float, float]], comm: Comm) -> list[tuple[float, float]]:
    """Loss and tokens of whole batches, from those of every dp rank's rows."""
    parts = comm.of_replicas(sums)
    return [tuple(map(math.fsum, zip(*batch, strict=True))) for batch in zip(*parts, strict=True)]


def summarize(sums: list[tuple[float, float]]) -> PerplexityResult:
    """The result of batches given as (sum of token losses, number of supervised tokens).

    Batches without any supervised token count in neither mean.
    """
    sums = [(loss, count) for loss, count in sums if count > 0]
    tokens = sum(count for _, count in sums)
    if not tokens:
        raise UserError(
            "eval_dataset: not one token of it is supervised (everything is padding or labelled -100); check "
            "pad_token_id and the records with `run_llm.py show-data FILE`"
        )
    mean = math.fsum(loss for loss, _ in sums) / tokens
    per_batch = math.fsum(loss / count for loss, count in sums) / len(sums)
    return PerplexityResult(mean, _exp(mean), int(tokens), len(sums), per_batch, _exp(per_batch))


def _exp(x: float) -> float:
    """exp that says inf instead of failing above 709."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
