#!/usr/bin/env python3
"""Preprocessing: the tokenizing stage in steady state against bare `sentencepiece`, with the same two threads.

    python benchmarks/preprocess.py [wiki|alpaca|squad ...] [--seconds 30] [--repetitions 3]

own      the stage that tools/dataset_preprocess runs: read, clean or render, encode, build rows and label masks, keep
         the chunk on disk; two worker processes that have started and loaded the tokenizer.
peer     sentencepiece's own `encode(list of texts, num_threads=2)` of the very texts that the stage encodes, which
         are ready in memory; ids come back as Python lists. The same with numpy arrays is in the result file.
command  the whole script, from its start to the MindRecord in place, on the same input (shorter; in the result file).

Text is repeated to about --seconds of work. Tokens are those of the text (no bos, eos, padding); own and peer must
produce the same number. The data are WikiText-2, Alpaca's rows and SQuAD's if the folder --data (or $RUN_LLM_DATA, or
../shared/data) has them, else the demo's text, questions and answers, which are made from Python's docstrings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common  # noqa: E402

FIGURES = ("wiki", "alpaca", "squad")
SEQ_LENGTH = 512
COMMAND_SHARE = 3  # the command gets a third of the stage's text: padded rows take much disk
SCRIPTS = common.ROOT / "tools" / "dataset_preprocess"


def main() -> int:
    args = parse_arguments()
    if args.side:
        common.pin_threads()
        print(json.dumps(SIDES[args.side](args.figures[0], Path(args.data), args.copies)))
        return 0
    with tempfile.TemporaryDirectory() as made:
        data = find_data(args.data) or make_data(Path(made))
        results, ratios = {}, []
        for figure in args.figures:
            results[figure], line = measure(figure, data, args.seconds, args.repetitions)
            ratios.append(line)
    source = "docstrings" if str(data) == made else "WikiText-2 train, Alpaca, SQuAD dev"
    settings = {"seconds": args.seconds, "seq_length": SEQ_LENGTH, "max_length": SQUAD_LENGTH, "data": source}
    common.write_result("preprocess", results, ratios, settings)
    print("\n".join(f"{figure}: {note(results[figure])}" for figure in args.figures))
    for line in ratios:
        common.ratio_line(line.name, line.ratio, line.own, line.unit, line.peer, line.peer_value)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", default=FIGURES, help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--seconds", type=float, default=30, help="of the peer's work in one repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--data", help="folder with wikitext-2, alpaca, squad and tokenizers/llama2")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--copies", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.figures) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    return args


def measure(figure: str, data: Path, seconds: float, repetitions: int) -> tuple[dict[str, Any], common.Ratio]:
    """All repetitions of one figure, own and peer in turn, and its ratio from the medians."""
    side = [figure, "--data", str(data), "--side"]
    once = common.run_side([*side, "peer"])
    copies = max(round(seconds / once["seconds"]), 1)
    command_copies = max(copies // COMMAND_SHARE, 1)
    own, peer = common.alternate(
        [*side, "own", "--copies", str(copies)], [*side, "peer", "--copies", str(copies)], repetitions
    )
    if {result["tokens"] for result in own} != {result["tokens"] for result in peer}:
        raise SystemExit(f"{figure}: own and sentencepiece did not produce the same number of tokens")
    numpy = common.run_side([*side, "numpy", "--copies", str(max(copies // 3, 1))])
    command = common.run_side([*side, "command", "--copies", str(command_copies)])
    own_rate, peer_rate = (statistics.median(r["tokens_per_s"] for r in results) for results in (own, peer))
    line = common.Ratio(f"preprocess_{figure}", own_rate / peer_rate, own_rate, "tokens/s", "sentencepiece", peer_rate)
    return {"copies": copies, "own": own, "peer": peer, "peer_numpy": numpy, "command": command}, line


def note(result: dict[str, Any]) -> str:
    peer = statistics.median(r["tokens_per_s"] for r in result["peer"])
    command, arrays = result["command"], result["peer_numpy"]["tokens_per_s"]
    return (
        f"whole command {command['tokens_per_s']:.4g} tokens/s in {command['seconds']:.1f} s "
        f"({command['tokens_per_s'] / peer:.2f} of sentencepiece); sentencepiece into numpy arrays {arrays:.4g}"
    )


def measure_own(figure: str, data: Path, copies: int) -> dict[str, float]:
    """The stage in steady state: both workers have encoded something before the clock starts."""
    from llm_core.data.chunks import ChunkEncoder, WorkFolder, read_chunk
    from llm_core.text import load_tokenizer

    tokenizer = load_tokenizer(data / "tokenizers" / "llama2")
    data_set = make_data_set(figure, data)
    chunks = data_set.chunks()
    with tempfile.TemporaryDirectory() as folder:
        with ChunkEncoder(tokenizer.path, data_set.encoder, common.THREADS) as encoder:
            with WorkFolder(Path(folder) / "warm", {}) as warm:
                for _ in encoder.start((chunks * 4)[: max(4, min(len(chunks), 8))], warm):
                    pass
            with WorkFolder(Path(folder) / "timed", {}) as work:
                begin = time.perf_counter()
                for _ in encoder.start(chunks * copies, work):
                    pass
                seconds = time.perf_counter() - begin
                tokens = sum(text_tokens(figure, tokenizer, read_chunk(work.file(i))) for i in range(len(chunks)))
    return rate(tokens * copies, seconds)


def text_tokens(figure: str, tokenizer: Any, chunk: Any) -> int:
    """Tokens of the text in an encoded chunk: all but bos and eos (one each a paragraph or sample here)."""
    if figure == "wiki":
        return len(chunk.arrays["ids"]) - 2 * chunk.counts["paragraphs"]
    counts = chunk.counts
    samples = counts["samples"] - counts.get("dropped_empty_turns", 0)
    return counts["tokens"] + counts["cut_tokens"] - 2 * samples


def measure_peer(figure: str, data: Path, copies: int, **options: Any) -> dict[str, float]:
    """Bare sentencepiece on the same texts."""
    import sentencepiece

    texts = texts_of(figure, data)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizers" / "llama2" / "tokenizer.model"))
    tokenizer.encode(texts[:200], num_threads=common.THREADS)
    tokens = 0
    begin = time.perf_counter()
    for _ in range(copies):
        tokens += sum(map(len, tokenizer.encode(texts, num_threads=common.THREADS, **options)))
    return rate(tokens, time.perf_counter() - begin)


def measure_numpy(figure: str, data: Path, copies: int) -> dict[str, float]:
    """As the peer, into arrays, which spares it the Python integers (sentencepiece 0.2.2 and later)."""
    return measure_peer(figure, data, copies, return_type="numpy")


def measure_command(figure: str, data: Path, copies: int) -> dict[str, float]:
    """The script from its start to its end, on `copies` of the input in one file."""
    tokens = measure_peer(figure, data, 1)["tokens"] * copies
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "input", Path(folder) / "out.mindrecord"
        copy_input(figure, data, source, copies)
        common_flags = ["--model_file", data / "tokenizers" / "llama2", "--output_file", output, "--num_workers", 2]
        if figure == "squad":
            script, flags = "squad_data_process.py", ["--input_file", source, "--max_length", SQUAD_LENGTH]
        else:
            kind = "wiki" if figure == "wiki" else "qa"
            flags = ["--dataset_type", kind, "--input_glob", source, "--seq_length", SEQ_LENGTH]
            script = "llama_preprocess.py"
        command = [sys.executable, SCRIPTS / script, *flags, *common_flags]
        begin = time.perf_counter()
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        return rate(tokens, time.perf_counter() - begin)


def rate(tokens: int, seconds: float) -> dict[str, float]:
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


SIDES: dict[str, Callable[[str, Path, int], dict[str, float]]] = {
    "own": measure_own, "peer": measure_peer, "numpy": measure_numpy, "command": measure_command,
}  # fmt: skip


# The data. Every figure's input, the data set of it, and the texts that are encoded.

SQUAD_LENGTH = 1024  # no passage of dev-v1.1 is longer, so nothing is dropped


def input_file(figure: str, data: Path) -> Path:
    return {
        "wiki": data / "wikitext-2" / "wiki.train.tokens",
        "alpaca": data / "alpaca" / "alpaca_data_5k.json",
        "squad": data / "squad" / "dev-v1.1.json",
    }[figure]


def make_data_set(figure: str, data: Path) -> Any:
    from llm_core.data.qa import Conversations
    from llm_core.data.squad import Squad
    from llm_core.data.wiki import WikiText

    source = input_file(figure, data)
    if figure == "wiki":
        return WikiText([source], SEQ_LENGTH)
    if figure == "squad":
        return Squad(source, SQUAD_LENGTH, "train")
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "conversations.json"
        copy_input("alpaca", data, converted, 1)
        data_set = Conversations([converted], SEQ_LENGTH)
        chunks = data_set.chunks()
    data_set.chunks = lambda: chunks  # read before the folder goes
    return data_set


def copy_input(figure: str, data: Path, target: Path, copies: int) -> None:
    """`copies` of the figure's input in one file; Alpaca's rows as conversations."""
    from llm_core.data.conversations import alpaca_to_conversation

    content = input_file(figure, data).read_bytes()
    if figure == "wiki":
        target.write_bytes((content + b"\n\n") * copies)
    elif figure == "squad":
        target.write_text(json.dumps({"data": json.loads(content)["data"] * copies}))
    else:
        rows = [alpaca_to_conversation(row, i, f"row {i}") for i, row in enumerate(json.loads(content))]
        target.write_text(json.dumps(rows * copies))


def texts_of(figure: str, data: Path) -> list[str]:
    """The texts that the stage encodes, in memory."""
    from llm_core.data.conversations import alpaca_to_conversation, sharegpt
    from llm_core.data.squad import read_squad
    from llm_core.data.wiki import paragraphs_of
    from llm_core.text.templates import conversation_template, render_rounds, squad_prompt

    source = input_file(figure, data)
    if figure == "wiki":
        return paragraphs_of(source.read_bytes())[0]
    if figure == "squad":
        questions = read_squad(source, all_questions=False)[0]
        return ["".join(squad_prompt(q.passage, q.question)) + q.answers[0] for q in questions]
    template = conversation_template("vicuna_v1.1")
    rows = [alpaca_to_conversation(row, i, f"row {i}") for i, row in enumerate(json.loads(source.read_bytes()))]
    conversations = [sharegpt(row, "row") for row in rows]
    rounds = [
        tuple(message["content"] for message in conversation.messages)
        for conversation in conversations
        if not conversation.has_empty_turn
    ]
    return ["".join(parts) for pair in rounds for parts in render_rounds(template, [pair])]


def find_data(given: str | None) -> Path | None:
    """--data, $RUN_LLM_DATA or ../shared/data, if it holds everything."""
    named = given or os.environ.get("RUN_LLM_DATA")
    folder = Path(named) if named else common.ROOT.parent / "shared" / "data"
    needed = [input_file(figure, folder) for figure in FIGURES] + [folder / "tokenizers" / "llama2" / "tokenizer.model"]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing and named:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}")
    return None if missing else folder


def make_data(folder: Path) -> Path:
    """Stand-ins of the same form: the demo's text, questions and tokenizer, made from Python's docstrings."""
    made = folder / "demo"
    corpus = [sys.executable, str(common.ROOT / "tools" / "demo_corpus.py"), "--output_dir", str(made)]
    subprocess.run([*corpus, "--vocab_size", "8192"], check=True, capture_output=True)
    rows = json.loads((made / "alpaca.json").read_text(encoding="utf-8"))
    passages = [
        {
            "context": row["output"],
            "qas": [{"question": row["instruction"], "answers": [{"text": row["output"].split("\n")[0]}]}],
        }
        for row in rows
    ]
    (made / "squad.json").write_text(json.dumps({"data": [{"paragraphs": passages}]}), encoding="utf-8")
    targets = {
        "train.txt": input_file("wiki", folder),
        "alpaca.json": input_file("alpaca", folder),
        "squad.json": input_file("squad", folder),
        "tokenizer.model": folder / "tokenizers" / "llama2" / "tokenizer.model",
    }
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        (made / name).rename(target)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
