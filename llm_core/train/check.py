"""The verb `check`: what would stop a run, found in seconds instead of after hours.

Looks at everything a run will touch without building the model: config, output folder, disk room, data, tokenizer,
weights by their heads. All problems are reported, not the first one alone.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llm_core.checkpoint.lock import lock_output_dir
from llm_core.checkpoint.weights import LoadReport, compare, open_weights
from llm_core.config import LoadedConfig, RunConfig
from llm_core.data.batch import IGNORED, shift
from llm_core.data.loader import Loader
from llm_core.data.open import open_loader
from llm_core.data.records import RecordFile
from llm_core.data.show import as_text, learnt_tokens, legend, tokenizer_facts
from llm_core.errors import EnvironmentFault, UserError
from llm_core.infer.load import adapter_for_inference
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.parallel.cuts import cut_parameters, held_parameters
from llm_core.parallel.layout import layout_from_config
from llm_core.peft.adapters import Adapter, adapters_in, base_alone, open_adapter
from llm_core.peft.apply import adapter_shapes, describe_parameters, parameter_counts
from llm_core.report.console import console, paint
from llm_core.text import Tokenizer, load_tokenizer
from llm_core.train.resume import require_base_elsewhere, store_of

_SAMPLED_RECORDS = 1000
_SHOWN_TOKENS = 256  # of the first record
_STATES_PER_WEIGHT = {"sgd": 1, "adagrad": 1, "adafactor": 1}  # of the others: 2 (mean and mean square)


def check(loaded: LoadedConfig) -> int:
    """Print one line for each thing looked at; returns 0 when nothing would stop the run, else 2."""
    config = loaded.config
    table = _Table()
    table.look("config", lambda: _config(loaded))
    spec = table.look("model", lambda: spec_from_config(config.model), _describe_model)
    adapter = _check_adapter(table, loaded, spec) if spec else None
    pet = config.model.config.pet_config or (adapter and adapter.pet)
    if spec:
        table.look("parameters", lambda: describe_parameters(spec, pet))
        if config.use_parallel:
            table.look("layout", lambda: _layout(config, spec, pet))
    table.look("output", lambda: _output_folder(config))
    training = config.run_mode in ("train", "finetune")
    if training and spec:
        table.look("disk", lambda: _disk_room(config, spec, pet))
    tokenizer = _check_tokenizer(table, config, spec)
    kinds = ["train"] * training + ["eval"] * (config.run_mode == "eval" or (training and config.do_eval))
    for kind in kinds:
        dataset = getattr(config, f"{kind}_dataset")
        if dataset is not None and dataset.data_loader.dataset_dir:  # else the config's line has said so
            _check_data(table, config, kind, tokenizer)
    if training and config.resume_training is True:
        table.look("resume", lambda: _resume_point(config))
    if config.load_checkpoint and spec:
        table.look("weights", lambda: _weights(config, spec, trains_adapter=training and pet is not None))
    elif config.run_mode in ("eval", "predict"):
        table.problem("weights", f"{loaded.path}: load_checkpoint is not set; name the weights with --load_checkpoint")
    return table.end()


class _Table:
    """The lines printed so far, and how many of them are problems."""

    def __init__(self) -> None:
        self._problems = 0
        self._started = time.monotonic()

    def look(self, what: str, at: Callable[[], object], describe: Callable | None = None) -> object | None:
        """What `at()` returns, with an OK line (`describe` of it, or itself); None and a problem line if it raises."""
        try:
            found = at()
        except (UserError, EnvironmentFault) as error:
            self.problem(what, str(error))
            return None
        self._line("OK", "green", what, str(describe(found) if describe else found))
        return found

    def note(self, what: str, text: str) -> None:
        """Worth a look, yet no reason to stop."""
        self._line("note", "yellow", what, text)

    def problem(self, what: str, text: str) -> None:
        self._problems += 1
        self._line("PROBLEM", "red", what, text)

    def _line(self, verdict: str, colour: str, what: str, text: str) -> None:
        first, *rest = text.splitlines() or [""]
        console.result(f"{paint(f'{verdict:<8}', colour)}{what:<11}{first}")
        for line in rest:
            console.result(" " * 19 + line)

    def end(self) -> int:
        seconds = time.monotonic() - self._started
        found = (
            f"{self._problems} problem{'s' * (self._problems > 1)}" if self._problems else "nothing would stop this run"
        )
        console.result(f"{found} (checked in {seconds:.1f} s)")
        return 2 if self._problems else 0


def _config(loaded: LoadedConfig) -> str:
    loaded.require_runnable(prompts=False, started=False)
    return f"{loaded.path}: run_mode {loaded.config.run_mode}"


def _layout(config: RunConfig, spec: DecoderSpec, pet: Any) -> str:
    """The ranks that the run needs, and the most that one of them holds; UserError where the model cannot be cut so."""
    layout = layout_from_config(config)
    cuts = cut_parameters(spec, layout, adapter_shapes(spec, pet))
    held = [
        sum(prod(cut.held_shape(layout, 3)) for cut in held_parameters(cuts, layout, rank).values())
        for rank in range(0, layout.world, layout.dp * layout.tp)  # the ranks of a stage hold the same number
    ]
    return f"{layout.describe()}: {layout.world} ranks, {max(held):,} parameters on one at most"


def _describe_model(spec: DecoderSpec) -> str:
    return (
        f"{spec.num_layers} layers, {spec.hidden_size} wide, {spec.num_heads} heads ({spec.num_kv_heads} kv), "
        f"vocabulary {spec.vocab_size}"
    )


# ------------------------------------------------------------------------------------- output folder and disk


def _output_folder(config: RunConfig) -> str:
    """Is another run writing there? Can a file be written, in the nearest folder that exists?"""
    output = Path(config.output_dir)
    if (output / ".run.lock").exists():
        with lock_output_dir(output):
            pass
    folder = _nearest_existing(output)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise EnvironmentFault(
            f"{output}: cannot write there ({error.strerror}). Choose another --output_dir."
        ) from None
    return f"{output}: writable" + ("" if folder == output else " (will be made)")


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _resume_point(config: RunConfig) -> str:
    store = store_of(config)
    latest = store.latest()
    return f"from {latest}" if latest else f"{store.folder}: no checkpoint yet; the run starts from the beginning"


def _disk_room(config: RunConfig, spec: DecoderSpec, pet: Any) -> str:
    """Room for the checkpoints that the run will keep, and the one that is written before the oldest goes."""
    monitor = config.callback("CheckpointMonitor")
    if monitor is None:
        return "no CheckpointMonitor: only a stop signal saves a checkpoint"
    folder = Path(monitor.directory or config.output_dir)
    states = _STATES_PER_WEIGHT.get(config.optimizer.type.lower(), 2) if config.optimizer else 2
    weights = parameter_counts(spec, pet)[0]  # of an adapter's run these alone are saved
    one = 4 * weights * (1 + states + monitor.save_network_params + monitor.save_trainable_params)
    count = monitor.keep_checkpoint_max + 1 + (monitor.keep_best is not None)
    there = sum(file.stat().st_size for file in folder.glob("checkpoint*/rank_*/*") if file.is_file())
    free = shutil.disk_usage(_nearest_existing(folder)).free
    text = f"{count} checkpoints of {_size(one)} take {_size(count * one)}; {_size(free)} are free" + (
        f", {_size(there)} taken by earlier ones" if there else ""
    )
    if count * one > free + there:
        raise EnvironmentFault(
            f"{folder}: {text}. Make room, choose another --output_dir, or keep fewer (keep_checkpoint_max "
            f"{monitor.keep_checkpoint_max})."
        )
    return text


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


# ---------------------------------------------------------------------------------------- tokenizer and data


def _check_tokenizer(table: _Table, config: RunConfig, spec: DecoderSpec | None) -> Tokenizer | None:
    """The run's tokenizer, if it names one. Training needs it for its samples alone."""
    file = config.processor.tokenizer.vocab_file
    samples = config.callback("SampleMonitor") is not None
    if not file:
        if config.run_mode == "predict" or samples:
            table.problem("tokenizer", "processor.tokenizer.vocab_file is not set: name the tokenizer's file with "
                          "--processor.tokenizer.vocab_file")  # fmt: skip
        return None
    return table.look("tokenizer", lambda: _fitting_tokenizer(file, spec), _describe_tokenizer)


def _fitting_tokenizer(file: str, spec: DecoderSpec | None) -> Tokenizer:
    tokenizer = load_tokenizer(file)
    if spec is not None and tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"{tokenizer.path}: {tokenizer.vocab_size} tokens, and the model has only {spec.vocab_size} "
            "(model.model_config.vocab_size). Take the tokenizer that the weights were trained with."
        )
    return tokenizer


def _describe_tokenizer(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.path}: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}"


def _check_data(table: _Table, config: RunConfig, kind: str, tokenizer: Tokenizer | None) -> None:
    loader = table.look(
        f"{kind} data",
        lambda: open_loader(config, getattr(config, f"{kind}_dataset"), kind),
        lambda found: (
            f"{found.records.path}: {found.num_records} records of {found.records.columns['input_ids']} tokens"
        ),
    )
    if loader is None:
        return
    table.look("  hashes", lambda: _hashes(loader.records))
    learnt = table.look("  ids", lambda: _sample(loader, config), _describe_sample)
    table.look("  steps", lambda: _steps(loader, config, kind, learnt))
    tokenizer = _tokenizer_of_data(table, loader.records, tokenizer)
    if tokenizer is not None:
        if learnt is not None and learnt[2] >= tokenizer.vocab_size:
            table.note(
                "  tokenizer", f"the data holds id {learnt[2]}, {tokenizer.path} has {tokenizer.vocab_size} tokens"
            )
        table.look("  first", lambda: _first_record(loader, config, tokenizer))


def _hashes(records: RecordFile) -> str:
    count = records.verify()
    return f"{count} files are as their manifest says" if count else "no manifest: not written by this program"


def _sample(loader: Loader, config: RunConfig) -> tuple[int, float, int]:
    """(records looked at, share of positions that are learnt, highest id), of records spread over the data."""
    model = config.model.config
    numbers = np.unique(np.linspace(0, loader.num_records - 1, _SAMPLED_RECORDS).astype(np.int64))
    batch = loader.read(numbers)
    _, labels = shift(batch, model.pad_token_id, model.ignore_token_id)
    learnt = float((labels != IGNORED).mean())
    if learnt == 0:
        raise UserError(
            f"{loader.records.path}: not one token of {len(numbers)} records is learnt: every label is -100 or follows "
            f"pad_token_id {model.pad_token_id}. Check model_config.pad_token_id, or write the data again."
        )
    return len(numbers), learnt, int(batch.input_ids.max())


def _describe_sample(sample: tuple[int, float, int]) -> str:
    count, learnt, highest = sample
    return f"{count} records looked at: highest id {highest}, {learnt:.1%} of the tokens learnt"


def _steps(loader: Loader, config: RunConfig, kind: str, sample: tuple[int, float, int] | None) -> str:
    supervised = ""
    if sample is not None:
        count, learnt, _ = sample
        tokens = round(learnt * loader.num_records * (loader.records.columns["input_ids"] - 1))
        supervised = f", {'' if count == loader.num_records else 'about '}{tokens:,} learnt tokens an epoch"
    if kind == "eval":
        return f"{loader.steps_per_epoch} batches of {loader.batch_size}{supervised}"
    runner = config.runner_config
    steps = -(-loader.steps_per_epoch // runner.gradient_accumulation_steps)
    total = min(runner.epochs * steps, runner.stop_step or runner.epochs * steps)
    return f"{steps} an epoch x {runner.epochs} epochs = {total} steps{supervised}"


def _tokenizer_of_data(table: _Table, records: RecordFile, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The run's tokenizer, or the one the data's manifest names where it is still there; notes a difference."""
    facts = tokenizer_facts(records)
    if tokenizer is None and facts.get("path") and Path(facts["path"]).is_file():
        tokenizer = load_tokenizer(facts["path"])
    if tokenizer is not None and facts.get("sha256", tokenizer.fingerprint) != tokenizer.fingerprint:
        table.note("  tokenizer", f"the data was made with another file than {tokenizer.path} (its sha256 differs)")
    return tokenizer


def _first_record(loader: Loader, config: RunConfig, tokenizer: Tokenizer) -> str:
    """The first record of the first batch as text."""
    batches = loader.epoch(0)
    try:
        batch = next(batches)
    finally:
        batches.close()
    learnt = learnt_tokens(batch, config.model.config.pad_token_id)
    text = as_text(batch.input_ids[0, :_SHOWN_TOKENS], learnt[0, :_SHOWN_TOKENS], tokenizer)
    more = batch.input_ids.shape[1] - _SHOWN_TOKENS
    return f"record {batch.record_ids[0]}, {legend()}:\n{text}" + (f" ... ({more} more)" if more > 0 else "")


# --------------------------------------------------------------------------------------------------- weights


def _check_adapter(table: _Table, loaded: LoadedConfig, spec: DecoderSpec) -> Adapter | None:
    """The adapter that the run starts from, or predicts with."""
    config = loaded.config
    if config.run_mode in ("eval", "predict") and (config.model.config.pet_config or _names_adapter(config)):
        return table.look("adapter", lambda: adapter_for_inference(loaded, spec), Adapter.line)
    if _names_adapter(config):
        return table.look("adapter", lambda: open_adapter(config, spec), Adapter.line)
    return None


def _names_adapter(config: RunConfig) -> bool:
    if config.adapter_id:
        return True
    try:
        return bool(config.load_checkpoint) and bool(adapters_in(config.load_checkpoint))
    except UserError:  # the line of the weights says it
        return False


def _weights(config: RunConfig, spec: DecoderSpec, trains_adapter: bool) -> str:
    """Names and shapes of the file against the model's, from the file's heads; an adapter's base is not in its way."""
    path = config.load_checkpoint
    if trains_adapter and not (config.resume_training and store_of(config).latest()):
        require_base_elsewhere(config, store_of(config))
    weights = open_weights(path)
    try:
        report = compare(base_alone(weights, path), parameter_shapes(spec))
    finally:
        weights.close()
    if set(report.missing) - set(report.fresh_head) or report.shape_mismatch:
        raise UserError(f"load_checkpoint: {path}: {_misfit(report)}. Check model.model_config against the file.")
    return f"{path}: {report.line()}"


def _misfit(report: LoadReport) -> str:
    shapes = [
        f"{name} is {list(theirs)} in the file and {list(ours)} in the model"
        for name, theirs, ours in report.shape_mismatch[:3]
    ]
    return "; ".join([report.line(), *shapes])
