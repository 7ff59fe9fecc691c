"""Which rank does what: data, tensor and pipeline parallelism over one list of ranks. Pure, without MindSpore.

Ranks are numbered with tensor parallelism fastest, then data, then pipeline, so that the ranks that exchange most sit
on one machine: rank = (stage * dp + replica) * tp + shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from llm_core.errors import UserError


class Place(NamedTuple):
    """Where a rank stands in the layout; each counted from 0."""

    stage: int  # of the pipeline: which layers it has
    replica: int  # of data parallelism: which rows of a batch it sees
    shard: int  # of tensor parallelism: which part of each layer it has


@dataclass(frozen=True)
class Layout:
    """dp x tp x pp ranks, and what they share beside the work.

    zero: what is cut over dp: 1 the optimizer's state, 2 the gradients too, 3 the parameters too (arXiv 1910.02054).
    zero_threshold: parameters of fewer bytes stay whole. micro_batches: parts of a batch that follow each other through
    the pipeline. chunks: pieces of the model that a stage has (interleaved stages). sequence_parallel: the norms and
    residuals of tp ranks hold different rows. whole_embedding: tp does not cut the embedding table.
    offset: layers that a stage has more (or fewer) than an even share.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    zero_threshold: int = 64 * 1024
    micro_batches: int = 1
    chunks: int = 1
    sequence_parallel: bool = False
    whole_embedding: bool = True
    offset: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.pp

    def place(self, rank: int) -> Place:
        """Of rank 0 .. world - 1."""
        rest, shard = divmod(rank, self.tp)
        stage, replica = divmod(rest, self.dp)
        return Place(stage, replica, shard)

    def rank(self, place: Place) -> int:
        """The reverse of `place`."""
        return (place.stage * self.dp + place.replica) * self.tp + place.shard

    def replicas(self, rank: int) -> tuple[int, ...]:
        """The dp group of a rank: those with its stage and shard."""
        at = self.place(rank)
        return tuple(self.rank(at._replace(replica=i)) for i in range(self.dp))

    def shards(self, rank: int) -> tuple[int, ...]:
        """The tp group of a rank: those with its stage and replica."""
        at = self.place(rank)
        return tuple(self.rank(at._replace(shard=i)) for i in range(self.tp))

    def stages(self, rank: int) -> tuple[int, ...]:
        """The pipeline of a rank, first stage first: those with its replica and shard."""
        at = self.place(rank)
        return tuple(self.rank(at._replace(stage=i)) for i in range(self.pp))

    def layers(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """The layers of every stage, in the order in which it computes them.

        Shared out evenly, the first stages taking what is left over, then moved by `offset`. With chunks the model is
        cut into pp * chunks pieces, of which stage s has the pieces s, s + pp, s + 2 pp ... (arXiv 2104.04473).
        UserError for a piece without a layer.
        """
        pieces = self.pieces(num_layers)
        return tuple(tuple(layer for piece in pieces[stage :: self.pp] for layer in piece) for stage in range(self.pp))

    def pieces(self, num_layers: int) -> tuple[range, ...]:
        """The layers of each of the pp * chunks pieces, in the model's order."""
        count = self.pp * self.chunks
        share, left = divmod(num_layers, count)
        sizes = [share + (i < left) for i in range(count)]
        if self.offset:
            if len(self.offset) != count or sum(self.offset):
                raise UserError(
                    f"model_config.offset: {list(self.offset)} must have {count} numbers, one for each piece of the "
                    "pipeline, whose sum is 0"
                )
            sizes = [size + more for size, more in zip(sizes, self.offset, strict=True)]
        if min(sizes) < 1:
            raise UserError(
                f"parallel_config.pipeline_stage: {num_layers} layers on {count} pipeline pieces leave a piece without "
                f"a layer ({sizes}); take fewer stages, or another offset"
            )
        ends = [sum(sizes[: i + 1]) for i in range(count)]
        return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))

    def describe(self) -> str:
        """A few words for logs and files: dp2, tp2 x pp2, dp4 zero 3."""
        parts = [f"{name}{size}" for name, size in (("dp", self.dp), ("tp", self.tp), ("pp", self.pp)) if size > 1]
        return " x ".join(parts or ["one process"]) + (f" zero {self.zero}" if self.zero else "")


def layout_from_config(config: Any) -> Layout:
    """The layout that a `RunConfig` asks for: one process unless use_parallel."""
    if not config.use_parallel:
        return Layout()
    asked, context = config.parallel_config, config.parallel
    sharded = context.parallel_optimizer_config
    offset = config.model.config.offset
    return Layout(
        dp=asked.data_parallel,
        tp=asked.model_parallel,
        pp=asked.pipeline_stage,
        zero=context.zero if asked.data_parallel > 1 else 0,
        zero_threshold=1024 * (64 if sharded is None else sharded.parallel_optimizer_threshold),
        micro_batches=asked.micro_batch_num if asked.pipeline_stage > 1 else 1,
        chunks=config.model.config.pp_interleave_num if asked.pipeline_stage > 1 else 1,
        sequence_parallel=asked.use_seq_parallel and asked.model_parallel > 1,
        whole_embedding=asked.vocab_emb_dp and asked.pipeline_stage == 1,
        offset=tuple(offset) if isinstance(offset, list | tuple) and asked.pipeline_stage > 1 else (),
    )
