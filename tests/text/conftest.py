"""A tokenizer.json with chat tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]"]


@pytest.fixture(scope="session")
def marked_json(tmp_path_factory, corpus) -> Path:
    """Byte-level BPE, as GPT-2's and Llama 3's."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus[:60_000].splitlines(), trainer)
    path = tmp_path_factory.mktemp("marked_json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
