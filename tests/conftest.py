"""Fixtures that several test folders share: real text and a real tokenizer, made from the standard library."""

from __future__ import annotations

import inspect
import io
import os
import pkgutil
from pathlib import Path

import pytest

from llm_core.runtime import prepare_environment, usable_cores

prepare_environment()
MOST_PROCESSES = 4  # of about 2 GB each


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means."""
    return min(usable_cores(), MOST_PROCESSES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes runs last, so that a plain mistake shows early.

    Where several processes share the tests it comes first: the first process begins with it, the others with the
    rest, and none is left with a long test when the others have ended.
    """
    shared = "PYTEST_XDIST_WORKER" in os.environ
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None) != shared)


@pytest.fixture(scope="session")
def corpus() -> str:
    """About 300 kB of English: docstrings and documentation topics that every Python carries."""
    import argparse
    import collections
    import decimal
    import logging
    import pydoc_data.topics
    import statistics
    import subprocess
    import textwrap

    parts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]
    for module in (argparse, collections, decimal, logging, statistics, subprocess, textwrap, pkgutil):
        for _, member in inspect.getmembers(module):
            doc = inspect.getdoc(member) if callable(member) else None
            if doc:
                parts.append(doc)
    return "\n\n".join(parts)[:300_000]


@pytest.fixture(scope="session")
def spm_model(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A SentencePiece BPE model of 512 pieces with byte fallback, laid out like Llama's (unk 0, bos 1, eos 2)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()),
        model_writer=model,
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        minloglevel=2,
        num_threads=1,
    )
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def marked_spm(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """As `spm_model`, like Llama's and InternLM's own: text is left as it is, <eoa> and <eoh> are control pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[:60_000].splitlines()),
        model_writer=model,
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<eoa>", "<eoh>"],
        minloglevel=2,
        num_threads=1,
    )
    path = tmp_path_factory.mktemp("marked") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
