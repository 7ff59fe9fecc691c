"""Memory of a rank by part, in bytes: weights, gradients, optimizer state, activations, logits, buffers.

Parameters, gradients, state and the residual stream are float32 on every device. Where products are of 16-bit numbers
(Ascend, GPU), what is kept for the backward pass of a product is a 16-bit copy of its factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llm_core.parallel.cuts import vocabulary_is_cut
from llm_core.parallel.layout import Layout
from llm_core.parallel.schedule import warm_up
from llm_core.plan.job import Job
from llm_core.plan.parameters import Held, Slices

MIB = 2**20
FLOAT, HALF = 4, 2

# What a process of a run holds on a CPU beside its numbers: the graphs that MindSpore has compiled, its pool's waste,
# matplotlib. In MiB and by measurement (docs/plan.md): a fixed part; for each layer; for each parameter, an adapter's
# and others'.
PROGRAM, PROGRAM_LAYER, PROGRAM_TENSOR, PROGRAM_ADAPTER = 100, 10.75, 0.6, 1.6
# The second graph, where gradients are accumulated: a share of the sums. Among several ranks it exchanges them: a fixed
# part (less in a pipeline, whose graphs are smaller), one for each parameter that learns, a multiple of the sums, and
# one for each parameter that ZeRO 1 scatters and gathers. Sequence parallelism takes more of every layer.
WINDOW_SUMS, SEQUENCE_LAYER = 0.87, 15
RANKS, STAGES, RANKS_TENSOR, RANKS_SUMS, RANKS_ROWS = 67, 35, 0.2, 1.58, 1.25
# ZeRO 3 gathers within the first graph, which MindSpore then holds more of than of anything else: for each parameter
# that is cut, and ten times their whole size.
GATHERED_TENSOR, GATHERED_SIZE = 8.2, 10


class Memory(NamedTuple):
    """Bytes on one rank."""

    weights: float
    gradients: float
    state: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it: the most that the rank holds at one time."""
        return sum(self)


PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def memory_of_stage(job: Job, layout: Layout, held: Slices, stage: int, layers: tuple[tuple[int, ...], ...]) -> Memory:
    """Of a rank of this pipeline stage; `layers` are those of every stage."""
    mine, last = layers[stage], stage == layout.pp - 1
    owned = held.of_stage(mine, layout, stage)
    activations = _activations(job, layout, stage, len(mine))
    logits = _logits(job, layout, held) if last else 0.0
    weights = owned.share(owned.weights, owned.weights_cut, layout.dp, layout.zero >= 3)
    if layout.zero in (1, 2):
        weights += owned.learning_cut // layout.dp  # a copy of the rows that this rank updates
    state = owned.share(owned.state, owned.state_cut, layout.dp, layout.zero >= 1)
    return Memory(
        weights=FLOAT * weights,
        gradients=_gradients(job, layout, owned, activations + logits),
        state=FLOAT * state,
        activations=activations,
        logits=logits,
        buffers=_buffers(job, layout, owned, len(mine)),
    )


def micro_batches(job: Job, layout: Layout) -> int:
    """How many batches make an update on one rank."""
    return job.records // (job.rows * layout.dp)


def _gradients(job: Job, layout: Layout, owned: Held, activations: float) -> float:
    """Bytes of gradients: those of one micro-batch, and the sums where there are several, or several ranks.

    Ranks exchange the sums when the activations are gone: what comes of that is new, and counts where it is more than
    the activations and the gradients of a micro-batch.
    """
    own = FLOAT * owned.share(owned.learning, owned.learning_cut, layout.dp, layout.zero >= 3)
    if layout.world == 1 and micro_batches(job, layout) == 1:
        return own
    sums = FLOAT * owned.share(owned.learning, owned.learning_cut, layout.dp, layout.zero >= 2)
    if layout.world == 1:
        return own + sums
    exchanged = FLOAT * owned.share(owned.learning, owned.learning_cut, layout.dp, layout.zero >= 1)
    return sums + max(own, exchanged - activations)


# ---- activations ----


def _activations(job: Job, layout: Layout, stage: int, layers: int) -> float:
    """Bytes kept for the backward pass of a micro-batch, and what the other micro-batches under way have left.

    A pipeline's backward pass repeats the forward of one piece of the model at a time; of the others under way only
    their inputs are kept.
    """
    tokens = job.rows * job.length
    width = job.spec.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    whole = layer_bytes(job, layout)
    again = 0 if job.device.is_cpu else job.recomputed(stage, layers)  # on a CPU the graph keeps them all the same
    kept = (layers - again) * whole + again * FLOAT * width
    if job.selective and not again and not job.device.is_cpu:
        kept -= layers * _selected_bytes(job, layout)
    working = _working_bytes(job, layout) + (whole if again else 0)
    ends = FLOAT * 3 * width  # the last norm's input and output, and the gradient of that
    inputs = FLOAT * width * waiting(layout, stage, micro_batches(job, layout))
    return tokens * (kept / layout.chunks + working + ends + inputs)


def waiting(layout: Layout, stage: int, window: int) -> int:
    """Inputs that a stage keeps at one time: of each piece and micro-batch under way, except where they are tokens."""
    if layout.pp == 1:
        return 0
    under_way = min(warm_up(layout.pp, stage, window, layout.chunks) + 1, window * layout.chunks)
    return under_way * (layout.chunks - 1) // layout.chunks if stage == 0 else under_way


def repeats(job: Job, layout: Layout, last: bool) -> float:
    """How often the forward pass of a stage's layers is computed again: by a pipeline for all but the model's last
    piece, and by recompute_config, except on a CPU."""
    by_pipeline = 0.0 if layout.pp == 1 else 1 - last / layout.chunks
    return by_pipeline + (bool(job.recompute) and not job.device.is_cpu)


def layer_bytes(job: Job, layout: Layout) -> float:
    """Bytes that a layer keeps of each token for its backward pass.

    The sums of the residual stream for the norms; queries, keys, values, output and log sums for the attention; the
    feed-forward's middle for its activation; what goes into products whose weights, or whose LoRA, learn.
    """
    spec, tp = job.spec, layout.tp
    stream = spec.hidden_size / (tp if layout.sequence_parallel else 1)
    q, kv, f = spec.q_size / tp, spec.kv_size / min(tp, spec.num_kv_heads), spec.ffn_size / tp
    factor = HALF if job.narrow and not job.device.is_cpu else FLOAT
    residual = FLOAT * stream * (2 if spec.residual == "sequential" else 1)
    attention = factor * (2 * q + 2 * kv * _keys_share(job)) + FLOAT * spec.num_heads / tp
    if factor == HALF:
        attention += HALF * q  # its output once more, as a factor of the next product
    middle = FLOAT * f * (2 if spec.mlp == "swiglu" else 1)
    # With sequence parallelism the rows of a norm are gathered before they go into products.
    return residual + attention + middle + factor * _input_values(job, tp, spec.hidden_size, f)


def _keys_share(job: Job) -> float:
    """Keys that are kept, as a share of a row's own: a prefix stands before them, in a copy."""
    length = getattr(job.pet, "prefix_token_num", 0) or getattr(job.pet, "pre_seq_len", 0)
    return 2 + length / job.length if length else 1


def _input_values(job: Job, tp: int, hidden: float, middle: float) -> float:
    """Values of a token that go into a layer's products and are kept for the gradients of weights.

    A full tuning keeps what the norms and the activation give. LoRA keeps that where it has no dropout; with dropout it
    keeps a copy for each of its own. The attention keeps its output in any case.
    """
    apart = job.spec.residual != "parallel"  # the feed-forward has a norm of its own
    if job.pet is None or getattr(job.pet, "freeze_exclude", None):
        return hidden * (1 + apart) + middle
    adapted = _adapted(job)
    if not adapted:
        return 0.0
    inputs = {"attention": hidden, "up": hidden if apart else 0.0, "down": middle}
    kept, shared = 0.0, set()
    for name, (_, width) in adapted.items():
        leaf = name.rpartition(".")[2]
        cut = tp if leaf in ("wo", "w2") else 1
        kept += (width / cut if job.pet.lora_dropout else 0) + job.pet.lora_rank
        shared.add({"wo": "", "w2": "down", "w1": "up", "w3": "up"}.get(leaf, "attention"))
    share = 1 / job.spec.num_layers
    if job.pet.lora_dropout:
        return kept * share
    if not apart and "up" in shared:
        shared.add("attention")
    return kept * share + sum(inputs[group] for group in shared if group)


def _adapted(job: Job) -> dict[str, tuple[int, int]]:
    """The linear layers of the decoder's layers that LoRA adapts: name -> (out, in)."""
    if job.pet is None or job.pet.pet_type != "lora":
        return {}
    from llm_core.peft.lora import targets

    return {name: shape for name, shape in targets(job.spec, job.pet).items() if name.startswith("model.layers.")}


def _selected_bytes(job: Job, layout: Layout) -> float:
    """What select_recompute does not keep of a layer: the activation of its feed-forward, the attention's output."""
    factor = HALF if job.narrow else FLOAT
    return factor * (job.spec.ffn_size + job.spec.q_size) / layout.tp


def _working_bytes(job: Job, layout: Layout) -> float:
    """Bytes of each token that the backward pass of one layer needs at a time: the gradients in its feed-forward."""
    return FLOAT * (3 if job.spec.mlp == "swiglu" else 2) * job.spec.ffn_size / layout.tp


# ---- logits, buffers ----


def _logits(job: Job, layout: Layout, held: Slices) -> float:
    """The logits of a micro-batch and what the loss makes of them.

    On a CPU the loss takes the head's matrix and makes few rows at a time, unless an adapter sits on the head; then its
    gradient is written over the logits. Elsewhere logits, log probabilities and gradient are there at the same time;
    with a cut vocabulary, anywhere, what the framework needs to differentiate a loss of several operators.
    """
    spec = job.spec
    rows = job.rows * job.length
    if spec.head != "causal":
        return FLOAT * 3 * rows * spec.num_labels
    if vocabulary_is_cut(spec, layout):
        return FLOAT * 6 * rows * spec.vocab_size / layout.tp
    if not job.device.is_cpu:
        return FLOAT * 3 * rows * spec.vocab_size
    return FLOAT * rows * spec.vocab_size * (held.ending.adapters > 0)


def _buffers(job: Job, layout: Layout, owned: Held, layers: int) -> float:
    """What is no number of the model: 16-bit copies of weights, groups' buffers, parameters that ZeRO has gathered; on
    a CPU MindSpore's graphs."""
    gathered = FLOAT * 2 * owned.largest if layout.zero == 3 else 0.0
    groups = (layout.dp > 1) + (layout.tp > 1) + (layout.pp > 1)
    if not job.device.is_cpu:
        copies = HALF * owned.products if job.narrow else 0.0
        return copies + gathered + groups * job.device.communicator
    program = PROGRAM + PROGRAM_LAYER * layers
    program += PROGRAM_TENSOR * (owned.tensors - owned.adapters) + PROGRAM_ADAPTER * owned.adapters
    sums = FLOAT / MIB * owned.share(owned.learning, owned.learning_cut, layout.dp, layout.zero >= 2)
    if layout.world > 1:
        program += (RANKS if layout.pp == 1 else STAGES) + RANKS_TENSOR * owned.learning_tensors + RANKS_SUMS * sums
        program += SEQUENCE_LAYER * layers * layout.sequence_parallel
        program += RANKS_ROWS * owned.learning_cut_tensors * (layout.zero == 1)
        if layout.zero == 3:
            program += GATHERED_TENSOR * owned.cut_tensors + GATHERED_SIZE * FLOAT / MIB * owned.weights_cut
    elif micro_batches(job, layout) > 1:
        program += WINDOW_SUMS * sums
    return MIB * program


def ranks_of(layout: Layout, stage: int) -> range:
    """The ranks of a pipeline stage, which all hold the same amount."""
    size = layout.dp * layout.tp
    return range(stage * size, (stage + 1) * size)


def largest(memories: Iterable[Memory]) -> Memory:
    """That of the fullest rank."""
    return max(memories, key=lambda memory: memory.total)
