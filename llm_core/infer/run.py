"""`--run_mode predict`: prompts in, answers to the screen and to output_dir."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llm_core.config import LoadedConfig, RunConfig
from llm_core.infer.load import load_completer
from llm_core.infer.prompts import read_prompts
from llm_core.infer.results import prepare_output_dir, write_answers, write_results
from llm_core.infer.sampling import sampling_params
from llm_core.parallel.join import join_ranks
from llm_core.parallel.stop import StopTogether
from llm_core.report.console import console, is_terminal
from llm_core.report.environment import save_run_record
from llm_core.signals import StopSignals, signals_blocked

if TYPE_CHECKING:
    from llm_core.infer.complete import Completion
    from llm_core.parallel.comm import Comm


def predict(loaded: LoadedConfig) -> int:
    """Answer the prompts of --predict_data; returns the exit code (130 or 143 if a stop signal cut it short).

    A single answer is streamed if stdout is a terminal, otherwise every prompt is printed with its answers as soon as
    its batch is done. Answers that were there when Ctrl-C or SIGTERM came are written too, and marked.
    Of several ranks the replicas share out the prompts, and rank 0 alone prints and writes the answers of all.
    """
    config = loaded.config
    params = sampling_params(loaded)
    prompts = read_prompts(config.predict_data or config.input_data or [], config.processor.prompt_format)
    folder = prepare_output_dir(config.output_dir)
    if config.save_file:
        prepare_output_dir(Path(config.save_file).parent)
    with signals_blocked(signal.SIGINT, signal.SIGTERM):  # for the threads that MindSpore starts
        comm = join_ranks(config, inference=True)
    if comm is not None:
        console.log_to(folder, comm.rank)
    completer = load_completer(loaded, comm)
    speaks = comm is None or comm.rank == 0
    if speaks:
        save_run_record(folder, sys.argv, loaded.as_yaml())

    live = speaks and len(prompts) == 1 and params.num_return_sequences == 1 and is_terminal(sys.stdout)
    results = []
    started = time.perf_counter()
    with _stop_signals(comm) as interrupted:
        if live:
            _show(completer.shown(prompts[0]))
        for completions in completer.complete(
            prompts,
            params,
            seed=config.seed,
            batch_size=config.predict_batch_size,
            on_text=_show if live else None,
            interrupted=interrupted,
        ):
            results.append(completions)
            for completion in completions if speaks else ():
                console.result("" if live else completion.prompt + completion.text)
    seconds = time.perf_counter() - started
    if speaks:
        _write(config, folder, results, _speed_line(results, completer.generator.timing, seconds))
    exit_code = interrupted.exit_code
    if comm is not None:  # a process that ends takes MindSpore's connections with it
        exit_code = max(map(int, comm.gate(str(exit_code))))
    if exit_code and speaks:
        console.warn(f"interrupted: {len(results)} of {len(prompts)} prompts were begun; what they got is in {folder}")
    return exit_code


def _stop_signals(comm: Comm | None) -> StopSignals:
    """Ranks that compute a token together have to end it together."""
    if comm is None or comm.layout.tp == 1:
        return StopSignals(signal.SIGINT, signal.SIGTERM)
    return StopTogether(comm, comm.layout.shards(comm.rank))


def _write(config: RunConfig, folder: Path, results: list[list[Completion]], speed: str) -> None:
    path = write_results(folder, results)
    console.info(speed)
    console.info(f"output result is saved at: {path}")
    if config.save_file:
        for file in write_answers(Path(config.save_file), results):
            console.info(f"answers are saved at: {file}")


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _speed_line(results, timing, seconds: float) -> str:
    tokens = sum(len(item.token_ids) for completions in results for item in completions)
    line = f"{len(results)} prompts, {tokens} new tokens in {seconds:.1f} s: "
    line += f"{tokens / seconds:.1f} tokens/s, compiling included"
    if timing.decode_tokens:
        line += f"; decoding alone {timing.decode_tokens / timing.decode_seconds:.1f} tokens/s"
    return line
