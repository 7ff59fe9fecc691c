"""`run_mode: train` and `finetune` (one path, as in MindFormers): from a loaded config to a finished run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.checkpoint.lock import lock_output_dir
from llm_core.checkpoint.store import CheckpointStore
from llm_core.config import LoadedConfig, RunConfig
from llm_core.data.loader import Loader
from llm_core.data.open import open_loader
from llm_core.errors import UserError
from llm_core.infer.load import end_ids, load_fitting_tokenizer
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.report.console import console
from llm_core.report.environment import save_run_record
from llm_core.report.metrics import MetricsLog
from llm_core.runtime import start
from llm_core.signals import signals_blocked
from llm_core.text import Tokenizer
from llm_core.train.anomaly import AnomalyPolicy
from llm_core.train.loop import Intervals, Run, fit, restore
from llm_core.train.loss_scale import build_loss_scale
from llm_core.train.schedule import build_schedule
from llm_core.train.timeline import OperatorProfile, Timeline


def train(loaded: LoadedConfig) -> int:
    """Run the training that a config describes; returns the exit code.

    0: trained to the end. 1: stopped by the anomaly policy. 128 + n: stopped by signal n, resumable.
    """
    config = loaded.config
    output_dir = Path(config.output_dir)
    with lock_output_dir(output_dir):
        console.log_to(output_dir)
        save_run_record(output_dir, sys.argv, loaded.as_yaml())
        with signals_blocked(signal.SIGINT, signal.SIGTERM):  # for the threads that MindSpore starts
            run = build(loaded)
        code = fit(run)
    for line in run.timeline.table():
        (console.result if config.profile else console.detail)(line)
    if run.operators is not None:
        trace = output_dir / "profile" / "timeline.json"
        run.timeline.write(trace)
        for line in ["", *run.operators.table(), "", f"timeline: {trace} (open it in chrome://tracing or Perfetto)"]:
            console.result(line)
    if code == 0:
        console.info(f"done: {run.cursor.step} steps, {run.cursor.tokens} supervised tokens; see {output_dir}")
    return code


def build(loaded: LoadedConfig) -> Run:
    """Every part of the run, cheap checks first: data and schedule before a weight is allocated."""
    config = loaded.config
    model = config.model.config
    spec = spec_from_config(config.model)
    samples = _callback(config, "SampleMonitor")
    tokenizer = load_fitting_tokenizer(loaded, spec) if samples is not None else None
    checkpoints = _callback(config, "CheckpointMonitor")
    resume_from, store = _resume_point(config, checkpoints)
    loader = open_loader(config, config.train_dataset, "train")
    eval_loader = open_loader(config, config.eval_dataset, "eval") if config.do_eval else None

    accumulation = config.runner_config.gradient_accumulation_steps or 1
    steps_per_epoch = -(-loader.steps_per_epoch // accumulation)
    epochs = config.runner_config.epochs
    total_steps = epochs * steps_per_epoch
    schedule = build_schedule(config.lr_schedule, config.optimizer, total_steps, steps_per_epoch)

    start(config)
    from llm_core.models.decoder import CausalLM  # these import mindspore, which `start` has to set up first
    from llm_core.models.heads import TokenLoss
    from llm_core.models.recompute import apply_recompute
    from llm_core.train.optim import build_optimizer
    from llm_core.train.step import Stepper

    net = CausalLM(spec, seed=None if config.load_checkpoint and resume_from is None else config.seed)
    if config.load_checkpoint and resume_from is None:
        _load_base(net, config.load_checkpoint)
    apply_recompute(net, config.recompute_config)
    parameters = net.trainable_params()
    optimizer = build_optimizer(config.optimizer, parameters)
    wrapper = config.runner_wrapper
    clip = wrapper.max_grad_norm if wrapper is not None and wrapper.use_clip_grad else None
    graph_key = {"spec": spec, "optimizer": config.optimizer, "recompute": config.recompute_config}
    stepper = Stepper(
        TokenLoss(net), optimizer, seed=config.seed, accumulation=accumulation, max_grad_norm=clip, graph_key=graph_key
    )
    console.info(
        f"model: {spec.num_parameters:,} parameters, {sum(p.size for p in parameters):,} trainable; "
        f"data: {loader.num_records} records, {steps_per_epoch} steps an epoch, {epochs} epochs"
    )

    every = {**net.parameters_dict(), **{state.name: state for state in optimizer.states}}
    run = Run(
        title=config.trainer.model_name or Path(config.output_dir).name,
        stepper=stepper,
        loader=loader,
        schedule=schedule,
        loss_scale=build_loss_scale(wrapper),
        anomaly=AnomalyPolicy(**config.anomaly.model_dump()),
        metrics=MetricsLog(config.output_dir, resume_step=None if resume_from is None else _step_of(resume_from)),
        intervals=_intervals(config, steps_per_epoch),
        epochs=epochs,
        total_steps=min(total_steps, config.runner_config.stop_step or total_steps),
        pad_token_id=model.pad_token_id,
        ignore_token_id=model.ignore_token_id,
        flops_per_sample=_flops_per_sample(spec, model.seq_length),
        store=store,
        snapshot=lambda: {name: parameter.asnumpy() for name, parameter in every.items()},
        load=lambda tensors: _set_all(every, tensors),
        settings={
            "batch_size": loader.batch_size, "gradient_accumulation_steps": accumulation, "seed": config.seed,
            "records": loader.num_records, "seq_length": model.seq_length, "total_steps": total_steps,
        },
        timeline=Timeline(keep=bool(config.profile)),
    )
    if resume_from is not None:
        _resume(run, *resume_from)
    if eval_loader is not None:
        run.evaluate = _evaluator(net, eval_loader, model)
    if samples is not None:
        run.sample = _sampler(net, spec, tokenizer, samples, model)
    run.on_step = _tensorboard(config, run)
    if config.profile:
        folder = Path(config.output_dir) / "profile"
        run.operators = OperatorProfile(folder, config.profile_start_step, config.profile_stop_step)
    return run


def _callback(config: RunConfig, kind: str) -> Any:
    return next((callback for callback in config.callbacks or () if callback.type == kind), None)


def _intervals(config: RunConfig, steps_per_epoch: int) -> Intervals:
    """How often the callbacks want things. Under sink_mode the log has a line every sink_size steps."""
    printing, samples = _callback(config, "MFLossMonitor"), _callback(config, "SampleMonitor")
    checkpoints = _callback(config, "CheckpointMonitor")
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


def _store(folder: str | Path, config: RunConfig, checkpoints: Any) -> CheckpointStore:
    prefix = (checkpoints.prefix if checkpoints is not None else None) or config.trainer.model_name or "CKP"
    if checkpoints is None:  # no regular saves asked for; a stop signal still saves
        return CheckpointStore(folder, prefix)
    return CheckpointStore(
        folder,
        prefix,
        keep_max=checkpoints.keep_checkpoint_max,
        file_format=checkpoints.checkpoint_format,
        keep_best=checkpoints.keep_best,
        save_network_params=checkpoints.save_network_params,
        keep_per_minutes=checkpoints.keep_checkpoint_per_n_minutes,
    )


def _resume_point(config: RunConfig, checkpoints: Any) -> tuple[tuple[dict, dict] | None, CheckpointStore]:
    """((tensors, state) to go on from, or None), and the store of this run.

    resume_training True takes the newest whole checkpoint of load_checkpoint's run if that is given, else of
    output_dir; a string names the file. Nothing there yet is no error: the run was killed before its first save.
    """
    folder = checkpoints.directory if checkpoints is not None and checkpoints.directory else config.output_dir
    store = _store(folder, config, checkpoints)
    if not config.resume_training:
        return None, store
    source = store
    if config.load_checkpoint and Path(config.load_checkpoint).is_dir():
        source = _store(_run_folder(Path(config.load_checkpoint)), config, checkpoints)
    if isinstance(config.resume_training, str):
        named = Path(config.resume_training)
        path = named if named.is_file() else source.folder / named.name
        if not path.is_file():
            raise UserError(f"--resume_training {named}: no such file, nor one of that name in {source.folder}")
    elif config.load_checkpoint and Path(config.load_checkpoint).is_file():
        path = Path(config.load_checkpoint)
    else:
        path = source.latest()
        if path is None:
            console.warn(f"resume_training: {source.folder} holds no checkpoint yet; starting from the beginning")
            return None, store
    tensors, state, _, _ = source.read(path)
    if "cursor" not in state:
        raise UserError(f"{path}: weights without a run's state; give it as --load_checkpoint and do not resume")
    console.info(f"resuming from {path}, step {state['cursor']['step']}")
    return (tensors, state), store


def _run_folder(folder: Path) -> Path:
    """The output_dir that a load_checkpoint folder belongs to: itself, or the one above checkpoint/rank_0."""
    if folder.name.startswith("rank_"):
        folder = folder.parent
    return folder.parent if folder.name == "checkpoint" else folder


def _resume(run: Run, tensors: dict[str, np.ndarray], state: dict[str, Any]) -> None:
    """Go on from a checkpoint, if this run would have come there by itself."""
    other = {
        name: (value, run.settings[name]) for name, value in state["settings"].items() if value != run.settings[name]
    }
    if other:
        changes = "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in other.items())
        raise UserError(
            f"resume_training: this is another run than the one that was saved: {changes}. Resume with the old values, "
            "or start a new run from these weights with --load_checkpoint"
        )
    restore(run, tensors, state)


def _step_of(resume_from: tuple[dict, dict]) -> int:
    return resume_from[1]["cursor"]["step"]


def _load_base(net: Any, path: str) -> None:
    from llm_core.checkpoint.weights import load_into, open_weights

    weights = open_weights(path)
    try:
        weights.verify()
        report = load_into(net, weights, source=path)
    finally:
        weights.close()
    console.info(f"{path}: {report.line()}")


def _set_all(parameters: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Every parameter from the tensor of its name; the sets of names and all shapes must be the same."""
    import mindspore as ms

    missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    wrong = [name for name in parameters.keys() & tensors.keys() if parameters[name].shape != tensors[name].shape]
    if missing or unexpected or wrong:
        raise UserError(
            f"resume_training: the checkpoint is of another model or optimizer: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    for name, parameter in parameters.items():
        parameter.set_data(ms.Tensor(np.ascontiguousarray(tensors[name]), dtype=parameter.dtype))


def _flops_per_sample(spec: DecoderSpec, length: int) -> float:
    """Floating-point operations of one training sample: 6 a weight and token, and 12 S^2 a channel of causal
    attention halved (PaLM, appendix B)."""
    embedding = 0 if spec.tied_head else spec.vocab_size * spec.hidden_size
    return 6.0 * (spec.num_parameters - embedding) * length + 6.0 * spec.num_layers * spec.q_size * length**2


def _evaluator(net: Any, loader: Loader, model: Any) -> Callable[[], float]:
    from llm_core.evals.perplexity import Perplexity

    perplexity = Perplexity(net, pad_token_id=model.pad_token_id, ignore_token_id=model.ignore_token_id)

    def evaluate() -> float:
        result = perplexity.measure(loader)
        console.log(result.mindformers_line())
        return result.loss

    return evaluate


def _sampler(net: Any, spec: DecoderSpec, tokenizer: Tokenizer, samples: Any, model: Any) -> Callable[[], None]:
    """SampleMonitor: continue its prompts greedily, so that one sees the model learn."""
    from llm_core.infer.complete import Completer
    from llm_core.infer.generate import Generator
    from llm_core.infer.sampling import SamplingParams

    completer = Completer(Generator(net, spec, eos_ids=end_ids(model), pad_id=model.pad_token_id), tokenizer)
    params = SamplingParams(max_new_tokens=samples.max_new_tokens)

    def sample() -> None:
        for (completion,) in completer.complete(samples.prompts, params):
            console.log(f"sample: {completion.prompt!r} -> {completion.text!r}")

    return sample


def _tensorboard(config: RunConfig, run: Run) -> Any:
    summary = _callback(config, "SummaryMonitor")
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
