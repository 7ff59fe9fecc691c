"""What a rank holds of a model, and what ranks exchange while it computes: tensor parallelism and ZeRO's third stage.

The model is the same decoder with fewer heads and a narrower feed-forward layer (`ParallelParts.local`). Before layers
that are cut by their outputs the gradient is summed over the tp ranks, behind those that are cut by their inputs the
output is (Megatron-LM, arXiv 1909.08053). With sequence parallelism (arXiv 2205.05198) the rows of norms and residuals
are shared out as well: any rows will do, since both work row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.alibi import AlibiBias
from llm_core.models.layers import Embedding, Parts
from llm_core.models.spec import DecoderSpec
from llm_core.parallel.comm import Comm, Gather, GatherRows, RowsOfSum, SumBackward, SumForward, SumRows
from llm_core.parallel.cuts import Cut, embedding_is_cut, vocabulary_is_cut


class ParallelParts(Parts):
    """The parts of a model as this rank of `comm` holds them.

    cuts: of every parameter, see `cuts.cut_parameters`. Raises UserError for a layout that the model does not fit.
    """

    def __init__(self, spec: DecoderSpec, comm: Comm, cuts: Mapping[str, Cut]) -> None:
        super().__init__(spec.bf16)
        self.spec, self.cuts = spec, cuts
        self.layout, self.place, self.rank = comm.layout, comm.place, comm.rank
        self.shards = self.layout.shards(self.rank)
        self.replicas = self.layout.replicas(self.rank)
        self.by_rows = self.layout.sequence_parallel
        self.cuts_vocabulary = vocabulary_is_cut(spec, self.layout)

    def local(self, spec: DecoderSpec) -> DecoderSpec:
        """As `Parts.local`: with tp every rank has its share of the heads."""
        tp = self.layout.tp
        kv_heads = max(spec.num_kv_heads // tp, 1)
        return replace(
            spec, num_heads=spec.num_heads // tp, num_kv_heads=kv_heads, ffn_size=spec.ffn_size // tp
        )

    def own_site(self, site: int) -> int:
        """As `Parts.own_site`: the masks of two shards are not alike."""
        return site + (self.place.shard << 20)  # layers have the numbers below

    def row_site(self, site: int) -> int:
        """As `Parts.row_site`: with sequence parallelism every rank has other rows."""
        return self.own_site(site) if self.by_rows else site

    def own_kv_heads(self) -> slice:
        """As `Parts.own_kv_heads`: where there are fewer than ranks, several have the same one."""
        count = max(self.spec.num_kv_heads // self.layout.tp, 1)
        first = self.place.shard * self.spec.num_kv_heads // self.layout.tp
        return slice(first, first + count)

    def alibi(self, heads: int) -> nn.Cell:
        """As `Parts.alibi`, of this rank's `heads` among all."""
        first = self.place.shard * heads
        return AlibiBias(self.spec.num_heads, slice(first, first + heads))

    def embedding(self, name: str, vocab_size: int, size: int, std: float, seed: int | None) -> nn.Cell:
        """As `Parts.embedding`."""
        if embedding_is_cut(self.spec, self.layout):
            return CutEmbedding(name, vocab_size, size, std, seed, self)
        if self.by_rows:
            return RowsOfEmbedding(name, vocab_size, size, std, seed, self)
        return super().embedding(name, vocab_size, size, std, seed)

    # ---- of one weight

    def tensor(self, name: str, shape: tuple[int, ...], values: Callable[[tuple[int, ...]], np.ndarray]) -> Tensor:
        """As `Parts.tensor`: the share of the whole weight, whose values do not depend on the layout."""
        cut = self.cuts[name]
        return Tensor(np.ascontiguousarray(cut.take(values(cut.shape), self.layout, self.place, stage=3)))

    def read(self, name: str) -> nn.Cell | None:
        """As `Parts.read`."""
        return WholeWeight(self._sum_group(name), self.replicas, self.rank) if self._is_sharded(name) else None

    def product(self, name: str) -> nn.Cell:
        """As `Parts.product`."""
        if not self._is_sharded(name):
            return super().product(name)
        return ShardedProduct(self._sum_group(name), self.replicas, self.rank, self.bf16)

    def _is_sharded(self, name: str) -> bool:
        return self.cuts[name].is_sharded(self.layout, 3)

    def _sum_group(self, name: str) -> tuple[int, ...]:
        return self.cuts[name].sum_group(self.layout, self.rank)

    # ---- between the parts

    def entry(self) -> nn.Cell | None:
        """As `Parts.entry`."""
        if self.layout.tp == 1:
            return None
        return GatherRows(self.shards, self.rank) if self.by_rows else SumBackward(self.shards)

    def exit(self, name: str) -> nn.Cell | None:
        """As `Parts.exit`: behind a layer cut by its inputs."""
        if self.layout.tp == 1 or self.cuts[f"{name}.weight"].axis != 1:
            return None
        return SumRows(self.shards, self.rank) if self.by_rows else SumForward(self.shards)

    def head_entry(self) -> nn.Cell | None:
        """As `Parts.head_entry`."""
        if self.layout.tp == 1:
            return None
        if self.by_rows:
            return GatherRows(self.shards, self.rank, same_use=not self.cuts_vocabulary)
        return SumBackward(self.shards) if self.cuts_vocabulary else None

    def whole_logits(self) -> nn.Cell | None:
        """As `Parts.whole_logits`."""
        return WholeLogits(self.shards, self.rank) if self.cuts_vocabulary else None

    def token_nll(self) -> nn.Cell:
        """As `Parts.token_nll`."""
        if not self.cuts_vocabulary:
            return super().token_nll()
        return CutNll(self.shards, self.place.shard, self.spec.vocab_size)

    def linear_nll(self, frozen: bool) -> nn.Cell:
        """As `Parts.linear_nll`."""
        if not self.cuts_vocabulary:
            return super().linear_nll(frozen)
        return CutLinearNll(self.token_nll(), self.bf16)


# ---- the vocabulary


class CutEmbedding(Embedding):
    """An embedding of which every tp rank has some rows: ids int32 [N] -> fp32 [N, D]; the other ids add zeros."""

    def __init__(
        self, name: str, vocab_size: int, size: int, std: float, seed: int | None, parts: ParallelParts
    ) -> None:
        super().__init__(name, vocab_size, size, std, seed, parts)
        self.count = vocab_size // parts.layout.tp
        self.begin = parts.place.shard * self.count
        self.lookup = core_ops.EmbeddingLookup(self.count)
        self.exit = SumRows(parts.shards, parts.rank) if parts.by_rows else SumForward(parts.shards)

    def construct(self, ids: Tensor) -> Tensor:
        own = ops.logical_and(ids >= self.begin, ids < self.begin + self.count)
        rows = self.lookup(self.used_weight(), (ids - self.begin) * ops.cast(own, ms.int32))
        return self.exit(rows * ops.cast(own, ms.float32).reshape(-1, 1))


class RowsOfEmbedding(Embedding):
    """A whole embedding, of whose results every rank goes on with its own rows (sequence parallelism)."""

    def __init__(
        self, name: str, vocab_size: int, size: int, std: float, seed: int | None, parts: ParallelParts
    ) -> None:
        super().__init__(name, vocab_size, size, std, seed, parts)
        self.cut = SumRows(parts.shards, parts.rank, same_use=True)

    def construct(self, ids: Tensor) -> Tensor:
        return self.cut(self.lookup(self.used_weight(), ids))


class WholeLogits(nn.Cell):
    """This rank's part of the logits [N, V / tp] -> [N, V]. Not to be differentiated."""

    def __init__(self, group: tuple[int, ...], rank: int) -> None:
        super().__init__(auto_prefix=False)
        self.gather, self.count = Gather(group, rank), len(group)

    def construct(self, logits: Tensor) -> Tensor:
        rows, width = logits.shape
        parts = self.gather(logits).reshape(self.count, rows, width)
        return ops.transpose(parts, (1, 0, 2)).reshape(rows, self.count * width)


class CutNll(nn.Cell):
    """`ops.TokenNll` of logits whose vocabulary is cut: logits fp32 [N, V / tp], labels int32 [N], negative = ignored.

    The ranks exchange three numbers a token: the largest logit, then the sum of exponentials and the label's logit.
    """

    def __init__(self, group: tuple[int, ...], shard: int, vocab_size: int) -> None:
        super().__init__(auto_prefix=False)
        self.shard, self.ranks = shard, len(group)
        self.count = vocab_size // len(group)
        self.begin = shard * self.count
        self.peaks, self.sum = SumForward(group), SumForward(group)
        self.largest = ops.ArgMaxWithValue(axis=-1, keep_dims=True)
        self.pick = ops.GatherD()

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        supervised = ops.cast(labels >= 0, ms.float32).reshape(-1, 1)
        own = ops.logical_and(labels >= self.begin, labels < self.begin + self.count)
        places = ((labels - self.begin) * ops.cast(own, ms.int32)).reshape(-1, 1)
        peak = self._peak(ops.stop_gradient(logits))
        target = self.pick(logits, 1, places) * ops.cast(own, ms.float32).reshape(-1, 1)
        both = self.sum(ops.concat((ops.exp(logits - peak).sum(-1, keepdims=True), target), 1))
        losses = (peak + ops.log(both[:, :1]) - both[:, 1:]) * supervised
        return losses.sum(), supervised.sum()

    def _peak(self, logits: Tensor) -> Tensor:
        """The largest logit of the whole vocabulary: [N, 1]."""
        _, own = self.largest(logits)
        slots = ()
        for i in range(self.ranks):
            slots = slots + (own if i == self.shard else ops.zeros_like(own),)
        _, peak = self.largest(self.peaks(ops.concat(slots, 1)))
        return ops.stop_gradient(peak)


class CutLinearNll(nn.Cell):
    """`ops.LinearNll` with this rank's rows of the head: x fp32 [N, H], weight fp32 [V / tp, H], labels int32 [N]."""

    def __init__(self, nll: nn.Cell, bf16: bool) -> None:
        super().__init__(auto_prefix=False)
        self.product, self.nll = core_ops.LinearProduct(bf16), nll

    def construct(self, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.nll(self.product(x, weight), labels)


# ---- ZeRO's third stage: every dp rank holds some rows of a weight


class WholeWeight(nn.Cell):
    """Rows [R / dp, ...] of a weight -> all of it; its gradient is summed over `summed` and cut to this rank's rows."""

    def __init__(self, summed: tuple[int, ...], replicas: tuple[int, ...], rank: int) -> None:
        super().__init__(auto_prefix=False)
        self.gather, self.reduce = Gather(replicas, rank), RowsOfSum(summed, replicas, rank)

    def construct(self, rows):
        return self.gather(rows)

    def bprop(self, rows, out, dout):
        return (self.reduce(dout),)


class ShardedProduct(nn.Cell):
    """x weight^T of x [N, in] and this rank's rows of the weight [out / dp, in] -> [N, out].

    The whole weight lives during a product alone: the backward pass gathers it once more.
    """

    def __init__(self, summed: tuple[int, ...], replicas: tuple[int, ...], rank: int, bf16: bool) -> None:
        super().__init__(auto_prefix=False)
        self.gather, self.reduce = Gather(replicas, rank), RowsOfSum(summed, replicas, rank)
        self.product = core_ops.LinearProduct(bf16)

    def construct(self, x, rows):
        return self.product(x, self.gather(ops.depend(rows, x)))

    def bprop(self, x, rows, out, dout):
        weight = self.gather(ops.depend(rows, dout))
        dx = self.product(dout, ops.transpose(weight, (1, 0)))
        dweight = self.product(ops.transpose(dout, (1, 0)), ops.transpose(x, (1, 0)))
        return dx, self.reduce(dweight)
