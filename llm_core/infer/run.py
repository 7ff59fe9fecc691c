"""`--run_mode predict`: prompts in, answers to the screen and to output_dir."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from llm_core.config import LoadedConfig
from llm_core.infer.load import load_completer
from llm_core.infer.prompts import read_prompts
from llm_core.infer.results import prepare_output_dir, write_answers, write_results
from llm_core.infer.sampling import sampling_params
from llm_core.report.console import console, is_terminal
from llm_core.report.environment import save_run_record
from llm_core.signals import StopSignals


def predict(loaded: LoadedConfig) -> int:
    """Answer the prompts of --predict_data; returns the exit code (130 or 143 if a stop signal cut it short).

    A single answer is streamed if stdout is a terminal, otherwise every prompt is printed with its answers as soon as
    its batch is done. Answers that were there when Ctrl-C or SIGTERM came are written too, and marked.
    """
    config = loaded.config
    params = sampling_params(loaded)
    prompts = read_prompts(config.predict_data or config.input_data or [], config.processor.prompt_format)
    folder = prepare_output_dir(config.output_dir)
    if config.save_file:
        prepare_output_dir(Path(config.save_file).parent)
    completer = load_completer(loaded)
    save_run_record(folder, sys.argv, loaded.as_yaml())

    live = len(prompts) == 1 and params.num_return_sequences == 1 and is_terminal(sys.stdout)
    results = []
    started = time.perf_counter()
    with StopSignals(signal.SIGINT, signal.SIGTERM) as interrupted:
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
            for completion in completions:
                console.result("" if live else completion.prompt + completion.text)
    seconds = time.perf_counter() - started

    path = write_results(folder, results)
    console.info(_speed_line(results, completer.generator.timing, seconds))
    console.info(f"output result is saved at: {path}")
    if config.save_file:
        for file in write_answers(Path(config.save_file), results):
            console.info(f"answers are saved at: {file}")
    if interrupted():
        console.warn(f"interrupted: {len(results)} of {len(prompts)} prompts were begun; what they got is in {path}")
        return interrupted.exit_code
    return 0


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
