"""A tokenizer.json split up as Falcon's and GPT-2's are: the ids and the text of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_core.text import load_tokenizer

# Falcon's: punctuation in runs, bytes, then numbers apart and in groups of three digits.
PIPELINES = {
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(tokenizers.Regex("[0-9][0-9][0-9]"), "isolated"),
    ],
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
TEXTS = [
    "def f(x):\n    return x + 1234567", "It's ... 42!", "  two  spaces ", "naïve 日本語 😀", "",
    "<|endoftext|> is text",
]  # fmt: skip


@pytest.fixture(params=PIPELINES)
def file(request, tmp_path: Path, corpus: str) -> Path:
    """A tokenizer of 400 pieces, its first piece <|endoftext|>."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PIPELINES[request.param])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus[:50_000].splitlines(), trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parity
def test_ids_are_those_of_transformers(file: Path, corpus: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    ours = load_tokenizer(file)
    for text in [*TEXTS, *corpus[50_000:60_000].splitlines()]:
        ids = ours.encode(text)
        assert list(ids) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == text


def test_one_token_begins_and_ends_a_text(file: Path) -> None:
    ours = load_tokenizer(file)
    assert ours.bos_id == ours.eos_id == 0
    assert list(ours.encode("a", bos=True)) == [0, *ours.encode("a")]
