"""The files that a predict run leaves in its output_dir."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_core.errors import EnvironmentFault

if TYPE_CHECKING:
    from llm_core.infer.complete import Completion

TEXT_FILE = "text_generation_result.txt"
JSONL_FILE = "text_generation_result.jsonl"


def prepare_output_dir(output_dir: str | Path) -> Path:
    """Make `output_dir` and prove that it can be written to, before minutes are spent on generating."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EnvironmentFault(f"{folder}: cannot write: {error.strerror}; choose another --output_dir") from error
    return folder


def write_results(folder: Path, results: Sequence[Sequence[Completion]]) -> Path:
    """Write both files (`results`: one list of completions a prompt) and return the path of the text file.

    text_generation_result.txt is MindFormers': the Python literal of a list with one
    {'text_generation_text': [prompt and answer, ...]} a prompt. The .jsonl beside it has one object a completion.
    """
    lines = [json.dumps(_record(item), ensure_ascii=False) for prompt in results for item in prompt]
    write_whole(folder / JSONL_FILE, "".join(line + "\n" for line in lines))
    write_whole(folder / TEXT_FILE, _literal(results))
    return folder / TEXT_FILE


def write_answers(path: Path, results: Sequence[Sequence[Completion]]) -> list[Path]:
    """Write the answers alone to `path`; returns the files written.

    .npy: an array of strings [prompts], or [prompts, answers to each] where there are several (readable without
    pickle), and in NAME.npy.json beside it a list of {"prompt", "answer"}. Any other name: write_results' text file.
    """
    if path.suffix != ".npy":
        write_whole(path, _literal(results))
        return [path]
    answers = np.array([[item.text for item in prompt] for prompt in results], str)
    content = io.BytesIO()
    np.save(content, answers[:, 0] if answers.ndim == 2 and answers.shape[1] == 1 else answers, allow_pickle=False)
    write_whole(path, content.getvalue())
    pairs = [{"prompt": item.prompt, "answer": item.text} for prompt in results for item in prompt]
    readable = path.with_name(f"{path.name}.json")
    write_whole(readable, json.dumps(pairs, ensure_ascii=False, indent=1))
    return [path, readable]


def _literal(results: Sequence[Sequence[Completion]]) -> str:
    return str([{"text_generation_text": [item.prompt + item.text for item in prompt]} for prompt in results])


def _record(item: Completion) -> dict:
    return {
        "prompt": item.prompt,
        "text": item.text,
        "prompt_tokens": item.prompt_tokens,
        "new_tokens": len(item.token_ids),
        "finish_reason": item.finish_reason,
        "seed": item.seed,
        "sequence": item.sequence,
    } | ({} if item.score is None else {"score": item.score})


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that has its name only when all of it is on the disk. EnvironmentFault if the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFault(f"{path}: cannot write the results: {error.strerror}") from error
