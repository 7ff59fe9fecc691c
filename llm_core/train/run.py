"""`run_mode: train` and `finetune` (one path, as in MindFormers): from a loaded config to a finished run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_core.checkpoint.lock import lock_output_dir
from llm_core.checkpoint.reshard import Share
from llm_core.config import LoadedConfig, RunConfig
from llm_core.data.loader import Loader
from llm_core.data.open import open_loader
from llm_core.errors import UserError
from llm_core.infer.load import end_ids, load_fitting_tokenizer
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.parallel.cuts import cut_parameters
from llm_core.parallel.join import join_ranks
from llm_core.parallel.layout import Layout
from llm_core.parallel.stop import StopTogether
from llm_core.peft.adapters import Adapter, open_adapter
from llm_core.peft.apply import adapter_shapes, describe_parameters, is_saved, is_trainable, parameter_counts
from llm_core.report.console import console
from llm_core.report.environment import save_run_record
from llm_core.report.metrics import MetricsLog
from llm_core.runtime import start
from llm_core.signals import signals_blocked
from llm_core.text import Tokenizer
from llm_core.train.anomaly import AnomalyPolicy
from llm_core.train.loop import Intervals, Run, fit, restore
from llm_core.train.loss_scale import build_loss_scale
from llm_core.train.resume import (
    ResumePoint,
    pet_of_run,
    require_base_elsewhere,
    require_same_base,
    require_same_run,
    require_same_tensors,
    resume_point,
    store_of,
)
from llm_core.train.schedule import build_schedule
from llm_core.train.timeline import OperatorProfile, Timeline

if TYPE_CHECKING:
    from mindspore import nn

    from llm_core.parallel.comm import Comm


def train(loaded: LoadedConfig) -> int:
    """Run the training that a config describes; returns the exit code.

    0: trained to the end. 1: stopped by the anomaly policy. 128 + n: stopped by signal n, resumable.
    """
    config = loaded.config
    output_dir = Path(config.output_dir)
    with signals_blocked(signal.SIGINT, signal.SIGTERM):  # for the threads that MindSpore starts
        comm = join_ranks(config)
    rank = 0 if comm is None else comm.rank
    with lock_output_dir(output_dir, rank):
        console.log_to(output_dir, rank)
        if rank == 0:
            save_run_record(output_dir, sys.argv, loaded.as_yaml())
        with signals_blocked(signal.SIGINT, signal.SIGTERM):
            run = build(loaded, comm)
        if config.only_save_strategy:
            shapes = {name: value.shape for name, value in run.snapshot().items()}
            console.info(f"only_save_strategy: {run.store.share.save_strategy(output_dir, shapes)}")
            code = 0
        else:
            code = fit(run)
        if comm is not None:
            comm.gate()  # a process that ends takes MindSpore's connections with it
    for line in run.timeline.table():
        (console.result if config.profile else console.detail)(line)
    if run.operators is not None:
        trace = run.operators.folder / "timeline.json"
        run.timeline.write(trace)
        for line in ["", *run.operators.table(), "", f"timeline: {trace} (open it in chrome://tracing or Perfetto)"]:
            console.result(line)
    if code == 0 and not config.only_save_strategy:
        console.info(f"done: {run.cursor.step} steps, {run.cursor.tokens} supervised tokens; see {output_dir}")
    return code


def build(loaded: LoadedConfig, comm: Comm | None = None) -> Run:
    """Every part of the run, cheap checks first: data and schedule before a weight is allocated.

    comm: with the other ranks, of which this is the one that it says.
    """
    config = loaded.config
    layout = Layout() if comm is None else comm.layout
    replica = 0 if comm is None else comm.place.replica
    reports = (comm is None or comm.rank == 0) and not config.only_save_strategy
    model = config.model.config
    spec = spec_from_config(config.model)
    samples = config.callback("SampleMonitor")
    tokenizer = load_fitting_tokenizer(loaded, spec) if samples is not None else None
    store = store_of(config, comm=comm)
    resumed = resume_point(config, store, comm)
    loader = open_loader(config, config.train_dataset, "train", replica, layout.dp)
    eval_loader = open_loader(config, config.eval_dataset, "eval", replica, layout.dp) if config.do_eval else None

    if eval_loader is not None and layout.sequence_parallel:
        _require_even_rows(eval_loader, layout)
    accumulation = (config.runner_config.gradient_accumulation_steps or 1) * layout.micro_batches
    steps_per_epoch = -(-loader.steps_per_epoch // accumulation)
    epochs = config.runner_config.epochs
    total_steps = epochs * steps_per_epoch
    schedule = build_schedule(config.lr_schedule, config.optimizer, total_steps, steps_per_epoch)
    settings = {
        "records_per_step": loader.batch_size * layout.dp * accumulation,
        "seed": config.seed,
        "records": loader.num_records,
        "data": loader.records.fingerprint,
        "seq_length": model.seq_length,
        "total_steps": total_steps,
    }
    adapter = None if resumed is not None else open_adapter(config, spec)
    pet = pet_of_run(config, resumed, adapter)
    if pet is not None:
        settings |= {f"pet_config.{name}": value for name, value in pet.model_dump().items()}
        if resumed is None:
            require_base_elsewhere(config, store)
    if resumed is not None:
        require_same_run(resumed.state["settings"], settings)

    start(config)
    from llm_core.models.decoder import describe_operators  # mindspore, which `start` has to set up first
    from llm_core.models.heads import training_loss
    from llm_core.models.recompute import apply_recompute
    from llm_core.peft.adapters import adapter_state
    from llm_core.train.optim import Idle, build_optimizer

    cuts = cut_parameters(spec, layout, adapter_shapes(spec, pet))
    pieces: list[dict[str, Any]] = [{}]
    if comm is not None:
        from llm_core.parallel.share import own_pieces

        store.share, pieces = Share(layout, comm.rank, cuts), own_pieces(spec, comm, cuts)
    nets, base = _build_nets(config, spec, pet, adapter, resumed, store.share, pieces)
    for net in nets:
        apply_recompute(net, config.recompute_config, comm.place.stage if layout.pp > 1 else None)
    if comm is not None:
        comm.gate()  # to load weights takes ranks unequal times, and the groups of a stepper are made together
    net = nets[0]
    by_name = {name: parameter for each in nets for name, parameter in each.parameters_dict().items()}
    parameters = [parameter for parameter in by_name.values() if parameter.requires_grad]
    wrapper = config.runner_wrapper
    clip = wrapper.max_grad_norm if wrapper is not None and wrapper.use_clip_grad else None
    graph_key = {"spec": spec, "optimizer": config.optimizer, "recompute": config.recompute_config, **net.graph_key}
    settings_of_step = dict(seed=config.seed, accumulation=accumulation, max_grad_norm=clip, graph_key=graph_key)
    if comm is None:
        from llm_core.train.step import Stepper

        optimizer = build_optimizer(config.optimizer, parameters)
        stepper = Stepper(training_loss(net), optimizer, **settings_of_step)
    else:
        from llm_core.train.parallel_step import ParallelStepper, optimizer_targets

        if not parameters and any(is_trainable(name, spec, pet) for name in cuts):  # on other stages
            optimizer = Idle()
        else:
            optimizer = build_optimizer(config.optimizer, optimizer_targets(parameters, cuts, comm))
        stepper = ParallelStepper(nets, parameters, cuts, optimizer, comm, **settings_of_step)
        console.info(f"rank {comm.rank} of {layout.world}: {layout.describe()}")
    console.info(describe_operators(spec))
    console.info(
        f"model: {describe_parameters(spec, pet)}; "
        f"data: {loader.num_records} records, {steps_per_epoch} steps an epoch, {epochs} epochs"
    )

    # With an adapter the base does not change: its checkpoints hold the adapter and what else is trained.
    saved = {name: p for name, p in by_name.items() if pet is None or is_saved(name, spec, pet)}
    every = {**saved, **{state.name: state for state in optimizer.states}}
    if resumed is not None:
        require_same_tensors(every, resumed.tensors)
    elif not config.only_save_strategy and (earlier := store.begin()):
        console.warn(
            f"{store.folder}: this run's checkpoints will take the places of an earlier run's {earlier}; to go on from "
            "those, stop it and add --resume_training True"
        )
    run = Run(
        title=config.trainer.model_name or Path(config.output_dir).name,
        stepper=stepper,
        loader=loader,
        schedule=schedule,
        loss_scale=build_loss_scale(wrapper),
        anomaly=AnomalyPolicy(**config.anomaly.model_dump()),
        metrics=_metrics(config, resumed) if reports else None,
        intervals=_intervals(config, steps_per_epoch),
        epochs=epochs,
        total_steps=min(total_steps, config.runner_config.stop_step or total_steps),
        pad_token_id=model.pad_token_id if spec.head == "causal" else -1,  # a classifier's labels say all
        ignore_token_id=model.ignore_token_id,
        flops_per_sample=_flops_per_sample(spec, pet, model.seq_length),
        store=store,
        snapshot=lambda: {name: parameter.asnumpy() for name, parameter in every.items()},
        load=lambda tensors: _set_all(every, tensors, stepper),
        comm=comm,
        settings=settings,
        adapter=None if pet is None else adapter_state(pet, config.load_checkpoint, base),
        trainable=_saved_alone(config, parameters if pet is None else saved.values()),
        timeline=Timeline(keep=bool(config.profile)),
        **({} if comm is None else {"stop": StopTogether(comm)}),
    )
    if resumed is not None:
        if pet is not None:
            require_same_base(resumed, run.adapter)
        restore(run, resumed.tensors, resumed.state)
        run.newest = resumed.path
    if eval_loader is not None:
        run.evaluate = _evaluator(nets, eval_loader, model, comm)
    if samples is not None:
        run.sample = _sampler(net, spec, tokenizer, samples, config)
    run.on_step = _tensorboard(config, run) if run.metrics is not None else None
    if config.profile:
        folder = Path(config.output_dir) / "profile" / ("" if comm is None else f"rank_{comm.rank}")
        before = run.cursor.step  # a resumed run counts from where it begins
        first = max(config.profile_start_step, 2)  # the first step compiles: that is not what one wants to see
        run.operators = OperatorProfile(folder, before + first, before + config.profile_stop_step)
    return run


def _require_even_rows(loader: Loader, layout: Layout) -> None:
    """UserError unless use_seq_parallel can share out the rows of an evaluation's batches."""
    length = loader.records.columns["input_ids"] - 1
    if loader.batch_size * length % layout.tp:
        raise UserError(
            f"{loader.records.path}: batches of {loader.batch_size} x {length} tokens are not shared evenly by "
            f"model_parallel {layout.tp} with use_seq_parallel: write the records with one token more, or change "
            "batch_size"
        )


def _metrics(config: RunConfig, resumed: ResumePoint | None) -> MetricsLog:
    return MetricsLog(config.output_dir, None if resumed is None else resumed.state["cursor"]["step"])


def _intervals(config: RunConfig, steps_per_epoch: int) -> Intervals:
    """How often the callbacks want things. Under sink_mode the log has a line every sink_size steps."""
    printing, samples = config.callback("MFLossMonitor"), config.callback("SampleMonitor")
    checkpoints = config.callback("CheckpointMonitor")
    runner = config.runner_config
    sink = 1 if not runner.sink_mode else steps_per_epoch if runner.sink_size == -1 else runner.sink_size
    return Intervals(
        print=sink * (printing.per_print_times if printing is not None else 1),
        evaluate=max(config.eval_step_interval, 0) if config.do_eval else 0,
        evaluate_epochs=max(config.eval_epoch_interval, 0) if config.do_eval else 0,
        sample=samples.sample_steps if samples is not None else 0,
        **_save_intervals(checkpoints),
    )


def _save_intervals(checkpoints: Any) -> dict[str, Any]:
    if checkpoints is None:
        return {}
    return {
        "save": checkpoints.save_checkpoint_steps,
        "save_seconds": checkpoints.save_checkpoint_seconds,
        "save_evaluated": checkpoints.keep_best is not None,
        "save_last": True,
    }


def _build_nets(
    config: RunConfig, spec: DecoderSpec, pet: Any, adapter: Adapter | None, resumed: ResumePoint | None,
    share: Share | None, pieces: list[dict[str, Any]],
) -> tuple[list[nn.Cell], dict[str, str]]:  # fmt: skip
    """The network, or this rank's `pieces` of it, with its starting weights. A resumed run restores its own
    later; of an adapter's run these are the adapter alone, so its base is loaded in any case."""
    from llm_core.peft.adapters import base_fingerprint, load_adapter, load_base
    from llm_core.peft.apply import build_net
    from llm_core.peft.lora_linear import reset_magnitudes

    restored = resumed is not None and pet is None
    seed = None if config.load_checkpoint or restored else config.seed
    nets = [build_net(spec, pet, seed, adapter_seed=config.seed, **each) for each in pieces]
    base: dict[str, str] = {}  # fingerprint of what is not trained
    for net in nets:
        if config.load_checkpoint and not restored:
            report = load_base(net, config.load_checkpoint, share, config.source_strategy)
            console.info(f"{config.load_checkpoint}: {report.line()}")
            found = report.fingerprint
        else:
            found = {} if pet is None else base_fingerprint(net, share)
        base.update(found)
        if adapter is not None:
            load_adapter(net, adapter, share, found)
        elif pet is not None:
            reset_magnitudes(net)
    if len(nets) > 1:
        from llm_core.parallel.pipeline import share_prefix

        share_prefix(nets)
    if adapter is not None:
        console.info(adapter.line())
    return nets, base


def _saved_alone(config: RunConfig, parameters: Iterable[Any]) -> frozenset[str] | None:
    """Names of the weights that CheckpointMonitor.save_trainable_params writes to checkpoint_trainable."""
    checkpoints = config.callback("CheckpointMonitor")
    if checkpoints is None or not checkpoints.save_trainable_params:
        return None
    return frozenset(parameter.name for parameter in parameters)


def _set_all(parameters: dict[str, Any], tensors: Mapping[str, np.ndarray], stepper: Any) -> None:
    """Every parameter from the tensor of its name."""
    import mindspore as ms

    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(np.ascontiguousarray(tensors[name]), dtype=parameter.dtype))
    stepper.refresh()


def _flops_per_sample(spec: DecoderSpec, pet: Any, length: int) -> float:
    """Floating-point operations of one training sample: 6 a weight and token (PaLM, appendix B), 2 of them for the
    gradient of the weight, which a frozen one does not have; and 12 S^2 a channel of causal attention halved."""
    embedding = 0 if spec.tied_head else spec.vocab_size * spec.hidden_size
    trainable, base, adapter = parameter_counts(spec, pet)
    weights = base + adapter - embedding
    return (4.0 * weights + 2.0 * min(trainable, weights)) * length + 6.0 * spec.num_layers * spec.q_size * length**2


def _evaluator(nets: list[Any], loader: Loader, model: Any, comm: Comm | None) -> Callable[[], dict[str, float]]:
    """Measures, says, and returns figures for the metrics file: the loss, and perplexity or accuracy and F1."""
    net = nets[0]
    if net.spec.head != "causal":
        from llm_core.evals.classification import Classification

        return Classification(net, comm).evaluator(loader)
    from llm_core.evals.perplexity import Perplexity

    perplexity = Perplexity(nets, pad_token_id=model.pad_token_id, ignore_token_id=model.ignore_token_id, comm=comm)

    def evaluate() -> dict[str, float]:
        result = perplexity.measure(loader)
        console.log(result.mindformers_line())
        return {"eval_loss": result.loss, "ppl": result.ppl}

    return evaluate


def _sampler(net: Any, spec: DecoderSpec, tokenizer: Tokenizer, samples: Any, config: Any) -> Callable[[], None]:
    """SampleMonitor: answer its prompts greedily, as a predict run would, so that one sees the model learn."""
    from llm_core.infer.complete import Completer
    from llm_core.infer.generate import Generator
    from llm_core.infer.prompts import wrapping
    from llm_core.infer.sampling import SamplingParams

    model = config.model.config
    generator = Generator(net, spec, eos_ids=end_ids(model), pad_id=model.pad_token_id)
    completer = Completer(generator, tokenizer, wrapping(config.processor, tokenizer))
    params = SamplingParams(max_new_tokens=samples.max_new_tokens)
    completer.encode(samples.prompts, params)  # a prompt that is too long is refused now, not at the first sample

    def sample() -> None:
        for (completion,) in completer.complete(samples.prompts, params):
            console.log(f"sample: {completion.prompt!r} -> {completion.text!r}")

    return sample


def _tensorboard(config: RunConfig, run: Run) -> Any:
    summary = config.callback("SummaryMonitor")
    if summary is None:
        return None
    from llm_core.report.tensorboard import TensorBoardLog

    log = TensorBoardLog(
        summary.summary_dir or Path(config.output_dir) / "summary",
        purge_step=run.cursor.step + 1 if run.cursor.step else None,
    )

    def write(step: int, values: dict[str, float]) -> None:
        if step % summary.per_steps == 0:
            log.write(step=step, **values)
            log.flush()

    return write
