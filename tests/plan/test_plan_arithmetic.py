"""The planner's arithmetic against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from llm_core.config import load_config
from llm_core.errors import UserError
from llm_core.parallel.cuts import EMBEDDING, cut_parameters, held_parameters
from llm_core.parallel.layout import Layout, Place
from llm_core.plan import estimate
from llm_core.plan.devices import device_named
from llm_core.plan.job import Job, job_of
from llm_core.plan.memory import layer_bytes, waiting
from llm_core.plan.search import Planner
from llm_core.plan.speed import flops, model_flops

# The demo's Llama: 4 layers, 256 wide, 8 heads over 4, feed-forward 688, 4096 pieces.
LAYER = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688 + 2 * 256
TABLE = 4096 * 256
DEMO = 4 * LAYER + 2 * TABLE + 256
NORMS = 9 * 256
CUT = DEMO - NORMS  # what ZeRO cuts: matrices
ALL = Layout(zero_threshold=0)


def demo_job(name: str = "pretrain_llama_demo", device: str = "910B", **changes: object) -> Job:
    """The demo's job on a device, 32 records of 256 tokens an update, a row at a time."""
    return replace(job_of(load_config(name), device, 1, 1), **{"rows": 1, "records": 32, **changes})


def test_one_process_holds_everything():
    memory = estimate(load_config("pretrain_llama_demo")).fullest
    assert (memory.weights, memory.gradients, memory.state) == (4 * DEMO, 4 * DEMO, 8 * DEMO)
    assert memory.logits == 0  # a few rows at a time


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "state"),
    [(0, 1, 2, 1), (1, 1 + 1 / 4, 2, 1 / 4), (2, 1 + 1 / 4, 1 + 1 / 4, 1 / 4), (3, 1 / 4, 2 / 4, 1 / 4)],
)
def test_zero_with_four_ranks_leaves_a_quarter(zero: int, weights: float, gradients: float, state: float):
    """Stages 1 and 2 keep a copy of the rows that they update; gradients are those of a micro-batch, and the sums."""
    found = Planner(demo_job()).estimate(replace(ALL, dp=4, zero=zero)).fullest
    assert found.weights == 4 * (CUT * weights + NORMS)
    assert found.gradients == 4 * (CUT * gradients + 2 * NORMS)
    assert found.state == 8 * (CUT * state + NORMS)


def test_small_tensors_stay_whole_under_zero():
    threshold = 4 * 256 * 256  # wk and wv have half of that
    found = Planner(demo_job()).estimate(Layout(dp=4, zero=3, zero_threshold=threshold)).fullest
    whole = NORMS + 4 * 2 * 128 * 256
    assert found.weights == 4 * (whole + (DEMO - whole) // 4)


def test_tensor_parallelism_halves_the_layers_and_the_head():
    found = Planner(demo_job()).estimate(Layout(tp=2)).fullest
    held = 4 * ((LAYER - 2 * 256) // 2 + 2 * 256) + TABLE + TABLE // 2 + 256  # vocab_emb_dp: the table is whole
    assert found.weights == 4 * held
    cut = Planner(demo_job()).estimate(Layout(tp=2, whole_embedding=False)).fullest
    assert cut.weights == 4 * (held - TABLE // 2)


def test_more_tensor_ranks_than_key_heads_share_their_slices():
    found = Planner(demo_job()).estimate(Layout(tp=8)).fullest
    layer = (2 * 256 * 256 + 3 * 256 * 688) // 8 + 2 * 256 * 128 // 4 + 2 * 256
    assert found.weights == 4 * (4 * layer + TABLE + TABLE // 8 + 256)


def test_stages_hold_their_layers_and_the_ends_the_tables():
    found = Planner(demo_job(records=32)).estimate(Layout(pp=3))
    assert [len(layers) for layers in found.layers] == [2, 1, 1]
    weights = [found.memory[stage].weights for stage in range(3)]
    assert weights == [4 * (2 * LAYER + TABLE), 4 * LAYER, 4 * (LAYER + 256 + TABLE)]


def test_a_tied_table_lies_on_both_ends():
    found = Planner(demo_job("pretrain_falcon_demo")).estimate(Layout(pp=2))
    layer = 2 * 256 * 256 + 2 * 32 * 256 + 2 * 256 * 1024 + 2 * 256
    assert found.memory[0].weights == 4 * (2 * layer + 4096 * 256)
    assert found.memory[1].weights == 4 * (2 * layer + 2 * 256 + 4096 * 256)
    assert found.traffic[0].gradients == found.traffic[1].gradients == 4 * 4096 * 256  # summed over the two


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_tied_table_on_two_stages_is_cut_as_the_run_cuts_it(zero: int):
    """From ZeRO 2 on it is whole: the two stages sum its gradient."""
    job, layout = demo_job("pretrain_falcon_demo"), replace(ALL, dp=2, pp=2, zero=zero)
    found, cuts = Planner(job).estimate(layout), cut_parameters(job.spec, layout)
    assert cuts[EMBEDDING].zero == (zero == 1)
    for stage in range(2):
        held = list(held_parameters(cuts, layout, layout.rank(Place(stage, 0, 0))).values())
        sizes = {kind: sum(prod(cut.held_shape(layout, kind)) for cut in held) for kind in (1, 3)}
        rows = sum(prod(cut.held_shape(layout, 1)) for cut in held if cut.zero)
        assert found.memory[stage].state == 8 * sizes[1]
        assert found.memory[stage].weights == 4 * (sizes[3] + rows * (zero < 3))
        passes = 16 * (3 - stage) if zero == 3 else 1  # of 16 micro-batches; the first stage repeats its forward
        assert found.traffic[stage].gathers == 4 * rows * passes


def test_70b_by_two_by_four_by_eight():
    found = estimate(load_config("pretrain_llama2_70b"))
    layer = (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) // 4 + 2 * 8192
    first = found.memory[0]
    table = 32000 * 8192 // 4  # vocab_emb_dp False
    assert first.weights == 4 * (10 * layer + table + (10 * layer - 20 * 8192 + table) // 2)  # a copy of its rows
    norms = 20 * 8192
    assert found.memory[3].weights == 4 * (10 * layer + (10 * layer - norms) // 2)
    assert found.memory[3].state == 8 * (norms + (10 * layer - norms) // 2)  # ZeRO 1 over dp 2; norms are 32 KB


def layer_of(changes: dict) -> float:
    """Values of a token that the demo's layer keeps on a CPU with this pet_config."""
    job = demo_job("lora_llama_demo", device="cpu")
    job = replace(job, pet=job.pet.model_copy(update=changes))
    return layer_bytes(job, Layout()) / 4


def test_what_lora_keeps_of_the_inputs_of_products():
    without = 2 * 256 + 2 * 256 + 2 * 128 + 2 * 688 + 8  # sums for the norms, attention, gate and up
    every = "wq|wk|wv|wo|w1|w2|w3"
    assert layer_of({"lora_dropout": 0, "target_modules": every}) == without + 2 * 256 + 688 + 7 * 8
    assert layer_of({"lora_dropout": 0.1, "target_modules": every}) == without + 6 * 256 + 688 + 7 * 8  # a copy each
    assert layer_of({"lora_dropout": 0, "target_modules": "wq|wv"}) == without + 256 + 2 * 8
    assert layer_of({"lora_dropout": 0, "target_modules": "w2"}) == without + 688 + 8
    assert layer_of({"lora_dropout": 0, "target_modules": "wo"}) == without + 8  # the attention keeps it in any case


@pytest.mark.parametrize("name", ["lora_llama_demo", "prefixtuning_llama_demo"])
def test_frozen_weights_have_no_gradients(name: str):
    one = Planner(demo_job(name)).estimate(Layout()).fullest
    if name.startswith("lora"):
        adapter = 4 * 8 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 688))
    else:
        width = 2 * 4 * 128  # keys and values of four layers
        adapter = 16 * width + 128 * width + 128 + width * 128 + width
    assert one.weights == 4 * (DEMO + adapter)
    assert (one.gradients, one.state) == (8 * adapter, 8 * adapter)  # with the sums
    stage = Planner(demo_job(name)).estimate(Layout(pp=2)).memory[0]
    assert stage.state == 8 * (adapter // 2 if name.startswith("lora") else adapter)  # a prefix is on every stage


def test_activations_of_a_layer_on_a_cpu():
    """x, two norms and the sum between (256 each), q and the output (256), k and v (128), 3 of 688, 8 log sums."""
    layer = 4 * 256 + 2 * 256 + 2 * 128 + 3 * 688 + 8
    found = Planner(demo_job(device="cpu", rows=8)).estimate(Layout())
    assert found.fullest.activations == 4 * 8 * 256 * (4 * layer + 3 * 256 + 3 * 688)


def test_sequence_parallelism_halves_the_residual_stream_and_gathers_what_products_take():
    job = demo_job(device="cpu")
    whole, rows = (layer_bytes(job, Layout(tp=2, sequence_parallel=flag)) for flag in (False, True))
    assert whole == 4 * (4 * 256 + (2 * 256 + 2 * 128 + 3 * 688 + 8) / 2)
    assert rows == whole - 4 * 2 * 128


def test_recomputing_keeps_the_inputs_of_layers_but_not_on_a_cpu():
    plain, again = (Planner(demo_job(recompute=flag)).estimate(Layout()) for flag in (False, True))
    assert again.fullest.activations < plain.fullest.activations / 2
    assert again.time.products > 1.2 * plain.time.products
    plain, again = (Planner(demo_job(device="cpu", recompute=flag)).estimate(Layout()) for flag in (False, True))
    assert again.fullest.activations == plain.fullest.activations


def test_logits_of_an_accelerator_and_of_a_cut_head():
    assert Planner(demo_job(rows=2)).estimate(Layout()).fullest.logits == 4 * 3 * 2 * 256 * 4096
    found = Planner(demo_job(device="cpu", rows=2)).estimate(Layout(tp=2)).fullest
    assert found.logits == 4 * 6 * 2 * 256 * 4096 // 2


@pytest.mark.parametrize(
    ("device", "zero", "gradients", "gathers"),
    [
        ("910B", 0, 2 * 3 / 4, 0), ("910B", 1, 3 / 4, 3 / 4), ("910B", 2, 8 * 3 / 4, 3 / 4),
        ("910B", 3, 8 * 3 / 4, 16 * 3 / 4), ("cpu", 1, 2 * 3 / 4, 2 * 3 / 4), ("cpu", 3, 16 * 3 / 4, 32 * 3 / 4),
    ],
)  # fmt: skip
def test_traffic_over_four_data_parallel_ranks(device: str, zero: int, gradients: float, gathers: float):
    """Rings: an all-reduce sends 2 * 3/4 of a tensor, its halves 3/4; on a CPU a half costs as much as the whole.

    32 records on 4 ranks are 8 micro-batches of a row, which matters where the sums are cut.
    """
    sent = Planner(demo_job(device=device)).estimate(replace(ALL, dp=4, zero=zero)).traffic[0]
    assert sent.gradients == pytest.approx(4 * (CUT * gradients + NORMS * 2 * 3 / 4))
    assert sent.gathers == pytest.approx(4 * CUT * gathers)
    assert (sent.tensors, sent.stages) == (0, 0)


def test_traffic_of_tensors_and_stages():
    stream = 4 * 256 * 256 * 32  # a row's hidden states, for 32 micro-batches
    sent = Planner(demo_job()).estimate(Layout(tp=4)).traffic[0]
    assert sent.tensors == pytest.approx(2 * 3 / 4 * stream * (4 * 4 + 1))  # four sums a layer, one for the cut head
    assert (sent.gradients, sent.gathers, sent.stages) == (0, 0, 0)
    found = Planner(demo_job()).estimate(Layout(pp=4)).traffic
    both = 2 * stream  # two stages exchange by an all-reduce: each sends as much as both messages
    assert [found[stage].stages for stage in range(4)] == [both, 2 * both, 2 * both, both]


def test_a_pipeline_computes_all_but_the_last_piece_again():
    """Forward 2 a weight and token, backward 4, attention 2 S a channel forward and 4 backward; the head 6 a weight."""
    layer = 2 * (LAYER - 2 * 256) + 2 * 256 * 256
    found = Planner(demo_job()).estimate(Layout(pp=2))
    operations = [flops(found.job, found.layout, found.held, stage, found.layers) for stage in range(2)]
    assert operations == [2 * 4 * layer, 2 * 3 * layer + 6 * TABLE]
    assert model_flops(found.job, found.layout, found.held, found.layers) == 4 * 3 * layer + 6 * TABLE
    chunks = Planner(demo_job()).estimate(Layout(pp=2, chunks=2))
    assert flops(chunks.job, chunks.layout, chunks.held, 1, chunks.layers) == (4 + 3) * layer + 6 * TABLE


@pytest.mark.parametrize(
    ("layout", "stage", "inputs"),
    [
        (Layout(pp=4), 0, 0),  # tokens alone
        (Layout(pp=4), 1, 3), (Layout(pp=4), 3, 1),
        (Layout(pp=2, chunks=2), 1, 3),  # half of the stage's pieces a micro-batch: 2 ahead, and one
        (Layout(), 0, 0),
    ],
)  # fmt: skip
def test_inputs_that_a_stage_keeps(layout: Layout, stage: int, inputs: int):
    assert waiting(layout, stage, 8) == inputs
    assert waiting(layout, stage, 1) <= 1 * layout.chunks

def test_one_norm_needs_one_sum_of_gradients_less():
    stream = 4 * 256 * 256 * 32
    job = demo_job("pretrain_falcon_demo")  # its branches are parallel, its head is the whole embedding
    assert Planner(job).estimate(Layout(tp=2)).traffic[0].tensors == pytest.approx(stream * 4 * 3)


def test_sequence_parallelism_costs_a_cpu_twice():
    rows = Layout(tp=2, sequence_parallel=True)
    found = [Planner(demo_job(device=name)).estimate(rows).traffic[0].tensors for name in ("910B", "cpu")]
    assert found[1] == 2 * found[0]


def test_time_of_the_products():
    """6 operations a weight and token, the table and the norms apart; attention 6 S a channel and layer."""
    job = demo_job(device="A100", narrow=True)
    found = Planner(job).estimate(Layout())
    products = 4 * (LAYER - 2 * 256) + TABLE
    needed = 6 * products + 4 * 6 * 256 * 256
    assert found.time.products == pytest.approx(32 * 256 * needed / (312e12 * 0.55))
    assert found.utilization == pytest.approx(0.55 * found.time.products / found.time.total)
    frozen = Planner(demo_job("prefixtuning_llama_demo", device="A100", narrow=True)).estimate(Layout())
    needed = 4 * products + 4 * 6 * 256 * 256  # the prefix's own products are few: once a micro-batch
    assert frozen.time.products == pytest.approx(32 * 256 * needed / (312e12 * 0.55))


def test_the_pipeline_idles_at_its_ends():
    found = Planner(demo_job(records=8)).estimate(Layout(pp=4))
    assert found.time.idle == pytest.approx(3 / 8 * found.time.products)
    halves = Planner(demo_job(records=8)).estimate(Layout(pp=2, chunks=2))
    assert halves.time.idle == pytest.approx(1 / 16 * halves.time.products)


def test_links_inside_and_between_machines():
    device = device_named("A100")
    near = Planner(demo_job(device="A100", records=32)).estimate(Layout(dp=8))
    far = Planner(demo_job(device="A100", records=32)).estimate(Layout(dp=16))
    assert near.time.gradients == pytest.approx(sum(near.traffic[0]) / device.link + 3 * device.latency)
    assert far.time.gradients == pytest.approx(sum(far.traffic[0]) / device.network + 3 * device.latency)


def test_ranks_of_a_cpu_share_its_cores_and_memory():
    one, two = (Planner(demo_job(device="cpu")).estimate(Layout(dp=dp)) for dp in (1, 2))
    assert two.time.products == pytest.approx(one.time.products)
    assert two.room == one.room / 2


def test_accumulating_adds_the_sums_and_a_graph():
    once = Planner(demo_job(device="cpu", rows=8, records=8)).estimate(Layout()).fullest
    twice = Planner(demo_job(device="cpu", rows=8, records=16)).estimate(Layout()).fullest
    assert twice.gradients == 2 * once.gradients
    assert twice.buffers - once.buffers == pytest.approx(0.87 * 4 * DEMO)
    assert twice.activations == once.activations


def test_no_layout_is_proposed_that_a_run_refuses():
    """Adafactor needs whole matrices, DoRA whole weights; the rows of a norm have to be even."""
    job = demo_job(rows=8)
    job = replace(job, optimizer=job.optimizer.model_copy(update={"type": "Adafactor"}))
    planner = Planner(job)
    for devices in (2, 4, 8):
        found = [each.layout for each in planner.layouts(devices, Layout())]
        assert found and all((layout.tp, layout.zero) == (1, 0) for layout in found)
    with pytest.raises(UserError, match="no layout of so many ranks"):
        planner.layouts(64 * 32, Layout())
    with pytest.raises(UserError, match="optimizer.type: Adafactor needs whole matrices"):
        planner.estimate(Layout(tp=2))
    tight = Planner(replace(job, room=0.99 * planner.estimate(Layout(dp=2)).fullest.total))
    changed = [each.layout for _, each in tight.changes(tight.estimate(Layout(dp=2)), 9)]
    assert changed and all((layout.tp, layout.zero) == (1, 0) for layout in changed)
    lora = demo_job("lora_llama_demo")
    dora = Planner(replace(lora, pet=lora.pet.model_copy(update={"use_dora": True})))
    layouts = [each.layout for each in dora._every(4, ALL)]
    assert {(layout.tp, layout.zero) for layout in layouts} == {(1, 0), (1, 1), (1, 2)}
    with pytest.raises(UserError, match="pet_config.use_dora"):
        dora.estimate(replace(ALL, dp=2, zero=3))
    odd = Planner(demo_job(rows=1, length=255))._every(2, Layout(sequence_parallel=True))
    assert [each.job.rows for each in odd if each.layout.tp == 2] == [2, 4, 8, 16]


def test_a_proposed_pipeline_cuts_the_embedding_as_the_run_does():
    """vocab_emb_dp holds without a pipeline alone."""
    planner = Planner(demo_job())
    tight = Planner(replace(demo_job(), room=planner.estimate(Layout(tp=2, pp=2)).fullest.total))
    wider = [each.layout for _, each in tight.changes(tight.estimate(Layout(tp=2)), 9) if each.layout.pp > 1]
    assert wider and not any(layout.whole_embedding for layout in wider)
