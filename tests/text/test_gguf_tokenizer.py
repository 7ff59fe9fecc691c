"""Tokenizers taken out of GGUF metadata encode as the tokenizers that went in; the chat template comes along."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
import tokenizers

from llm_core.errors import UserError
from llm_core.text import load_tokenizer
from llm_core.text.chat import chat_format, part_ids
from llm_core.text.gguf_tokenizer import tokenizer_files

TEXTS = [
    "Hello  world, how are you?",
    "中文 abc😀é 再见",
    " leading and trailing ",
    "\n\nlines\n\tand tabs\n\n\n",
    "In 2026 it cost 1234567.89, didn't it? 'TIS",
    "<|im_start|>text is text</s>",
    "x",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@pytest.fixture(scope="module")
def bpe(corpus) -> tokenizers.Tokenizer:
    """SmolLM's kind: single digits, byte-level BPE, special tokens first."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(corpus[:60_000].splitlines(), tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return made


def bpe_fields(bpe: tokenizers.Tokenizer, **changes) -> dict:
    """The metadata that llama.cpp's converter makes of it."""
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields = {
        "model": "gpt2", "pre": "smollm", "tokens": tokens,
        "token_type": [CONTROL if token in SPECIAL else NORMAL for token in tokens],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2, "unknown_token_id": 0, "add_bos_token": False,
    } | changes  # fmt: skip
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return named | {"tokenizer.chat_template": TEMPLATE, "llama.context_length": 64}


def written(folder, fields):
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_files(fields, "model.gguf").items():
        (folder / name).write_bytes(content)
    return folder


def test_byte_level_bpe(tmp_path, bpe):
    folder = written(tmp_path / "out", bpe_fields(bpe))
    tok = load_tokenizer(folder)
    bpe.encode_special_tokens = True
    for text in TEXTS:
        assert tok.encode(text) == bpe.encode(text).ids, text
        assert tok.decode(tok.encode(text)) == text
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id, tok.unk_id) == (500, 1, 2, 2, 0)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False,
        "clean_up_tokenization_spaces": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>", "model_max_length": 64, "chat_template": TEMPLATE,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 1234's  x", ["ab", "Ġ1234", "'s", "Ġ", "Ġx"]),
        ("smollm", "ab 1234", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", "ab 12345's\n\nx", ["ab", "Ġ", "123", "45", "'s", "ĊĊ", "x"]),
        ("qwen2", "ab 123'S x", ["ab", "Ġ", "1", "2", "3", "'S", "Ġx"]),
    ],
)
def test_how_text_is_cut(bpe, pre, text, pieces):
    content = tokenizer_files(bpe_fields(bpe, pre=pre), "model.gguf")["tokenizer.json"]
    cut = tokenizers.Tokenizer.from_str(content.decode()).pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_a_bos_that_the_library_is_to_add(tmp_path, bpe):
    fields = bpe_fields(bpe, add_bos_token=True)
    made = tokenizers.Tokenizer.from_str(tokenizer_files(fields, "model.gguf")["tokenizer.json"].decode())
    assert made.encode("a", add_special_tokens=True).ids == [1, *made.encode("a", add_special_tokens=False).ids]


@pytest.mark.parity
def test_transformers_reads_the_folder(tmp_path, bpe):
    transformers = pytest.importorskip("transformers")
    folder = written(tmp_path / "out", bpe_fields(bpe))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in TEXTS[:5]:
        assert theirs(text)["input_ids"] == ours.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "user: Hi"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)


@pytest.fixture(scope="module", params=[True, False], ids=["space in front", "none"])
def spm(request, corpus) -> sentencepiece.SentencePieceProcessor:
    """Llama's kind: BPE with byte fallback that leaves the text as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[:60_000].splitlines()), model_writer=model, vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2, num_threads=1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=request.param, user_defined_symbols=["<|tool|>"],
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def spm_fields(spm, **changes) -> dict:
    ids = range(spm.vocab_size())
    kinds = [
        2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i)
        else 4 if spm.id_to_piece(i) == "<|tool|>" else 1 for i in ids
    ]  # fmt: skip
    fields = {
        "model": "llama", "tokens": [spm.id_to_piece(i) for i in ids], "scores": [spm.get_score(i) for i in ids],
        "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 0,
        "add_space_prefix": spm.encode("a", out_type=str)[0].startswith("▁"),
    } | changes  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def test_sentencepiece(tmp_path, spm):
    folder = written(tmp_path / "out", spm_fields(spm))
    tok = load_tokenizer(folder)
    for text in [*TEXTS, "a <|tool|> b"]:
        assert tok.encode(text) == spm.encode(text), text
        assert tok.decode(tok.encode(text)) == spm.decode(spm.encode(text))
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id, tok.unk_id) == (400, 1, 2, 0, 0)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["add_bos_token"]) == ("LlamaTokenizer", True)
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


@pytest.mark.parity
@pytest.mark.parametrize("use_fast", [True, False])
def test_transformers_puts_spaces_where_we_do(tmp_path, corpus, use_fast):
    """As llama.cpp: before every text between special tokens, or before none."""
    transformers = pytest.importorskip("transformers")
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}[/INST]\n{{ m.role }}{% endfor %}"
    messages = [{"role": "user", "content": "the  string "}]
    for in_front in (True, False):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus[:60_000].splitlines()), model_writer=model, vocab_size=400, model_type="bpe",
            byte_fallback=True, minloglevel=2, num_threads=1, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=in_front, control_symbols=["[INST]", "[/INST]"],
        )
        spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        fields = spm_fields(spm) | {"tokenizer.chat_template": template}
        folder = written(tmp_path / str(in_front), fields)
        theirs = transformers.AutoTokenizer.from_pretrained(folder, use_fast=use_fast)
        ours = load_tokenizer(folder)
        expected = theirs.apply_chat_template(messages)
        assert part_ids(chat_format("tokenizer", ours).prompt(messages), ours) == expected
        behind = ours.id_to_piece(expected[expected.index(spm.piece_to_id("[/INST]")) + 1])
        assert behind == ("▁" if in_front else "<0x0A>")
        for text in TEXTS:
            assert theirs(text.replace("</s>", ""))["input_ids"] == ours.encode_prompt(text.replace("</s>", ""))


def test_pieces_of_its_own_as_ends(tmp_path, spm):
    """A file may name any piece as its end, whatever kind it has in the list."""
    tok = load_tokenizer(written(tmp_path / "out", spm_fields(spm, eos_token_id=300, padding_token_id=301)))
    assert (tok.eos_id, tok.pad_id) == (300, 301)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre (how text is cut) is 'tekken'"),
        ({"pre": None}, "tokenizer.ggml.pre (how text is cut) is None"),
    ],
)
def test_an_unknown_kind_is_not_guessed(bpe, changes, what, capsys):
    assert tokenizer_files(bpe_fields(bpe, **changes), "model.gguf") == {}
    said = "".join(capsys.readouterr())
    assert what in said and "no tokenizer is written" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_type": [1]}, "tokens has 500 entries and tokenizer.ggml.token_type 1"),
        ({"tokens": None}, "tokens has 0 entries"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' is there twice"),
        ({"merges": ["no such"]}, "model.gguf/tokenizer.json: not a tokenizer.json"),
    ],
)
def test_lists_that_contradict_each_other(bpe, changes, message):
    with pytest.raises(UserError, match=message):
        tokenizer_files(bpe_fields(bpe, **changes), "model.gguf")


def test_scores_that_are_missing(spm):
    with pytest.raises(UserError, match="tokens has 400 entries and tokenizer.ggml.scores 0"):
        tokenizer_files(spm_fields(spm, scores=None), "model.gguf")
