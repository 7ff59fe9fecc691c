"""Memory of a rank by part, in bytes: weights, gradients, optimizer state, activations, logits, buffers.

Parameters, gradients, state and the residual stream are float32 on every device. Where products are of 16-bit numbers
(Ascend, GPU), what is kept for the backward pass of a product is a 16-bit copy of its factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llm_core.parallel.cuts import vocabulary_is_cut
from llm_core.parallel.layout import Layout
from llm_core.plan.job import Job
from llm_core.plan.parameters import Held, Slices

MIB = 2**20
FLOAT, HALF = 4, 2

# What a process of a run holds on a CPU beside its numbers: the graphs that MindSpore has compiled, its pool's waste,
# matplotlib. In MiB, and by measurement (docs/plan.md): a fixed part, one for each layer, one for each of a layer's
# parameters, and one for a second graph where gradients are accumulated.
PROGRAM, PROGRAM_LAYER, PROGRAM_TENSOR, PROGRAM_WINDOW = 100, 10.75, 0.6, 17


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
    mine, first, last = layers[stage], stage == 0, stage == layout.pp - 1
    owned = held.of_stage(mine, first, last)
    weights = owned.share(owned.weights, owned.weights_cut, layout.dp, layout.zero >= 3)
    state = owned.share(owned.state, owned.state_cut, layout.dp, layout.zero >= 1)
    gradients = _gradients(layout, owned, micro_batches(job, layout))
    return Memory(
        weights=FLOAT * weights,
        gradients=FLOAT * gradients,
        state=FLOAT * state,
        activations=_activations(job, layout, stage, len(mine)),
        logits=_logits(job, layout, held) if last else 0.0,
        buffers=_buffers(job, layout, owned, len(mine)),
    )


def micro_batches(job: Job, layout: Layout) -> int:
    """How many batches make an update on one rank."""
    return job.records // (job.rows * layout.dp)


def _gradients(layout: Layout, owned: Held, window: int) -> int:
    """Values of gradients: those of one micro-batch, and the sums where there are several."""
    summed = owned.share(owned.learning, owned.learning_cut, layout.dp, layout.zero >= 2)
    return owned.learning + summed if window > 1 else owned.learning


# ---- activations ----


def _activations(job: Job, layout: Layout, stage: int, layers: int) -> float:
    """Bytes kept for the backward pass of a micro-batch, and what the other micro-batches under way have left.

    In a pipeline a stage keeps the inputs of the micro-batches under way, and computes the rest again (1F1B: at most
    as many as there are stages from here on).
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
    waiting = 0.0
    if layout.pp > 1:
        waiting = FLOAT * width * in_flight(layout, stage, micro_batches(job, layout)) * layout.chunks
    return tokens * (kept + working + ends + waiting)


def in_flight(layout: Layout, stage: int, window: int) -> int:
    """Micro-batches that are under way in a stage at one time."""
    return min(layout.pp - stage, window)


def layer_bytes(job: Job, layout: Layout) -> float:
    """Bytes that a layer keeps of each token for its backward pass.

    The input of a layer's last product is kept for the gradient of its weight, and only where that, or LoRA on it,
    learns; the other inputs are kept by the norms and the attention in any case.
    """
    spec, tp = job.spec, layout.tp
    stream = spec.hidden_size / (tp if layout.sequence_parallel else 1)
    q, kv, f = spec.q_size / tp, spec.kv_size / min(tp, spec.num_kv_heads), spec.ffn_size / tp
    norms = 1 if spec.residual == "parallel" else 2
    inputs = 1 if spec.residual == "sequential" else 0  # the sum between the branches
    factor = HALF if job.narrow and not job.device.is_cpu else FLOAT
    residual = FLOAT * stream * (1 + inputs) + factor * stream * norms
    attention = factor * (2 * q + 2 * kv) + FLOAT * spec.num_heads / tp
    if factor == HALF:
        attention += HALF * q  # its output once more, as a factor of the next product
    middle = 2 if spec.mlp == "swiglu" else 1
    adapted = _adapted(job)
    last = factor * f if job.pet is None or any(name.endswith(".w2") for name in adapted) else 0.0
    return residual + attention + FLOAT * middle * f + last + _adapter_bytes(job, layout, adapted, factor)


def _adapted(job: Job) -> dict[str, tuple[int, int]]:
    """The linear layers of the decoder's layers that LoRA adapts: name -> (out, in)."""
    if job.pet is None or job.pet.pet_type != "lora":
        return {}
    from llm_core.peft.lora import targets

    return {name: shape for name, shape in targets(job.spec, job.pet).items() if name.startswith("model.layers.")}


def _adapter_bytes(job: Job, layout: Layout, adapted: dict[str, tuple[int, int]], factor: int) -> float:
    """What LoRA keeps beside: with dropout, another input for each of its products; its narrow middle."""
    kept = 0.0
    for name, (_, inputs) in adapted.items():
        cut = layout.tp if name.endswith((".wo", ".w2")) else 1
        kept += factor * ((inputs / cut if job.pet.lora_dropout else 0) + job.pet.lora_rank)
    return kept / job.spec.num_layers


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

    On a CPU the loss takes the head's matrix and makes few rows at a time, unless the vocabulary is cut or an adapter
    sits on the head; then its gradient is written over the logits. Elsewhere logits, log probabilities and gradient are
    there at the same time.
    """
    spec = job.spec
    rows = job.rows * job.length
    if spec.head != "causal":
        return FLOAT * 3 * rows * spec.num_labels
    width = spec.vocab_size / (layout.tp if vocabulary_is_cut(spec, layout) else 1)
    if not job.device.is_cpu:
        return FLOAT * 3 * rows * width
    whole_head = layout.tp == 1 and held.ending.tensors <= 3
    return 0.0 if whole_head else FLOAT * rows * width


def _buffers(job: Job, layout: Layout, owned: Held, layers: int) -> float:
    """What is no number of the model: 16-bit copies of weights, groups' buffers, parameters that ZeRO has gathered; on
    a CPU MindSpore's graphs."""
    gathered = FLOAT * 2 * owned.largest if layout.zero >= 3 else 0.0
    groups = (layout.dp > 1) + (layout.tp > 1) + (layout.pp > 1)
    if not job.device.is_cpu:
        copies = HALF * owned.products if job.narrow else 0.0
        return copies + gathered + groups * job.device.communicator
    tensors = owned.tensors - 3
    program = PROGRAM + PROGRAM_LAYER * layers + PROGRAM_TENSOR * tensors
    if micro_batches(job, layout) > 1:
        program += PROGRAM_WINDOW
    return MIB * program + gathered


def ranks_of(layout: Layout, stage: int) -> range:
    """The ranks of a pipeline stage, which all hold the same amount."""
    size = layout.dp * layout.tp
    return range(stage * size, (stage + 1) * size)


def largest(memories: Iterable[Memory]) -> Memory:
    """That of the fullest rank."""
    return max(memories, key=lambda memory: memory.total)
