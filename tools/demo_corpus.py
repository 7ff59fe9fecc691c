#!/usr/bin/env python3
"""A small corpus out of what every Python carries, for the demo: no download, nothing committed.

    python tools/demo_corpus.py --output_dir demo_output/corpus [--vocab_size 4096]

writes, in the order of the demo's stages,
    train.txt, valid.txt   the documentation topics of pydoc_data and the standard library's docstrings, as
                           paragraphs between blank lines; every 20th document goes to valid.txt
    alpaca.json            question/answer pairs made from the same docstrings, as {instruction, input, output}
    prompts.json           three of the questions, written as the fine-tuned model has met them
    tokenizer.model        a SentencePiece BPE model with byte fallback, laid out like Llama's: <unk> 0, <s> 1,
                           </s> 2, no padding piece (pads are 0 and never supervised)
A file that is already there is kept, so that a second run goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llm_core.report.console import console  # noqa: E402

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
VALID_EVERY = 20
QUESTIONS = (
    "What does json.dumps do?",
    "What is the class collections.OrderedDict?",
    "What is the Python module argparse for?",
)
PAIRS = 2400  # as many as a few minutes of fine-tuning read once
ANSWER_LENGTH = (30, 400)  # characters


@dataclass(frozen=True)
class Docstring:
    """One docstring of the standard library."""

    name: str  # dotted: json.decoder.JSONDecoder.decode
    kind: str  # module, class, function
    signature: str  # "dumps(obj, *, indent=None)" for functions, else ""
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=4096)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    texts = [args.output_dir / "train.txt", args.output_dir / "valid.txt"]
    pairs = args.output_dir / "alpaca.json"
    tokenizer = args.output_dir / "tokenizer.model"
    if not all(path.exists() for path in (*texts, pairs)):
        docstrings = list(read_docstrings())
        write_texts(docstrings, *texts)
        write_pairs(docstrings, pairs)
    for path in (*texts, pairs):
        console.info(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    if not tokenizer.exists():
        train_tokenizer(texts[0], tokenizer, args.vocab_size)
    console.info(f"{tokenizer}: {args.vocab_size} pieces")
    _write(args.output_dir / "prompts.json", json.dumps([prompt_of(q) for q in QUESTIONS], indent=1))
    return 0


# ---- the text ----


def read_docstrings() -> Iterator[Docstring]:
    """Every docstring of the standard library's sources, parsed and not imported; in the order of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old docstrings
        for path in console.progress(files, desc="docstrings", unit="file"):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # a few files hold errors on purpose
                continue
            yield from _walk(tree, module)


def _walk(node: ast.AST, name: str) -> Iterator[Docstring]:
    kinds = {ast.Module: "module", ast.ClassDef: "class", ast.FunctionDef: "function"}
    kind = kinds.get(type(node))
    text = ast.get_docstring(node) if kind else None
    if text:
        arguments = ast.unparse(node.args) if kind == "function" else ""
        yield Docstring(name, kind, f"{node.name}({arguments})" if kind == "function" else "", text)
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            yield from _walk(child, f"{name}.{child.name}")


def write_texts(docstrings: list[Docstring], train: Path, valid: Path) -> None:
    """Paragraphs between blank lines. Whole documents go to one side, and valid.txt loses the paragraphs that
    documents of the other side repeat, so that it is unseen text."""
    documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    documents += [d.text for d in docstrings]
    documents = list(dict.fromkeys(text.strip() for text in documents if len(text) > 40))
    parts = [_paragraphs(text) for text in documents]
    read = [part for index, document in enumerate(parts) if index % VALID_EVERY for part in document]
    seen = set(read)
    held_out = [part for document in parts[::VALID_EVERY] for part in document if part not in seen]
    _write(train, "\n\n".join(read) + "\n")
    _write(valid, "\n\n".join(held_out) + "\n")


def _paragraphs(text: str) -> list[str]:
    parts = (re.sub(r"\s*\n\s*", " ", part).strip() for part in re.split(r"\n\s*\n", textwrap.dedent(text)))
    return [part for part in parts if part]


def write_pairs(docstrings: list[Docstring], path: Path) -> None:
    """Questions whose answer is the first paragraph of a public name's docstring."""
    pairs = []
    for doc in docstrings:
        answer = _paragraphs(doc.text)[0]
        public = not any(part.startswith("_") for part in doc.name.split("."))
        if not public or not ANSWER_LENGTH[0] <= len(answer) <= ANSWER_LENGTH[1]:
            continue
        pairs.append({"instruction": _question(doc), "input": "", "output": answer})
        if doc.kind == "function":
            ask = "Describe this Python function in a sentence or two."
            pairs.append({"instruction": ask, "input": f"def {doc.signature}", "output": answer})
    stride = max(1, len(pairs) // PAIRS)  # evenly over the library, which comes in alphabetical order
    _write(path, json.dumps(pairs[::stride][:PAIRS], ensure_ascii=False, indent=1))


def _question(doc: Docstring) -> str:
    if doc.kind == "module":
        return f"What is the Python module {doc.name} for?"
    if doc.kind == "class":
        return f"What is the class {doc.name}?"
    return f"What does {doc.name} do?"


def prompt_of(question: str) -> str:
    """The text before the answer, as `alpaca_converter.py` and `llama_preprocess.py --dataset_type qa` write it."""
    from llm_core.text.templates import alpaca_prompt, conversation_template, render_rounds

    ((prompt, _),) = render_rounds(conversation_template("vicuna_v1.1"), [(alpaca_prompt(question), "")])
    return prompt


def _write(path: Path, text: str) -> None:
    whole = path.with_name(path.name + ".part")
    whole.write_text(text, encoding="utf-8")
    os.replace(whole, path)


# ---- the tokenizer ----


def train_tokenizer(text: Path, model: Path, vocab_size: int) -> None:
    """Train it in a process of its own, whose log on stderr says how many merges there are: hence the bar."""
    part = model.with_name(model.name + ".part")
    child = subprocess.Popen(
        [sys.executable, "-c", _TRAINING, str(text), str(part), str(vocab_size)],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    last_lines = []
    with console.progress(vocab_size, desc="tokenizer", unit="piece") as bar:
        for line in child.stderr:
            last_lines = [*last_lines[-9:], line.rstrip()]
            size = re.search(r"\bsize=(\d+)", line)
            if size:
                bar.update(max(0, int(size[1]) - bar.n))
        bar.update(vocab_size - bar.n)
    if child.wait():
        raise SystemExit("the tokenizer could not be trained:\n" + "\n".join(last_lines))
    os.replace(part, model)


_TRAINING = """
import sys, sentencepiece
text, part, vocab_size = sys.argv[1:]
with open(part, "wb") as file:
    sentencepiece.SentencePieceTrainer.train(
        input=text, model_writer=file, vocab_size=int(vocab_size), model_type="bpe", byte_fallback=True,
        split_digits=True, character_coverage=0.9995, max_sentence_length=16384, num_threads=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
"""


if __name__ == "__main__":
    raise SystemExit(main())
