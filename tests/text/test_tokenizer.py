"""Tokenizers: both file kinds behind one interface; offsets and streaming on more than plain English."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from llm_core.errors import UserError
from llm_core.text import Tokenizer, load_tokenizer

TEXTS = [
    "Hello  world, how are you?",
    "中文 abc😀é 再见",
    "ﬁne Ⅷ ｆｕｌｌ  wide",  # NFKC would change every word
    " leading and trailing ",
    "\n\nlines\n\tand tabs\n",
    "e\u0301 combining, and a family: 👨‍👩‍👧",
    "<s>not a special token</s>",
    "x",
]


def _train(folder: Path, corpus: str, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()), model_writer=model, vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2, num_threads=1, **options,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory, corpus) -> Tokenizer:
    """Laid out as Llama's: identity normalization, a space in front, no whitespace removed."""
    folder = tmp_path_factory.mktemp("llama")
    return load_tokenizer(_train(folder, corpus[:60_000], normalization_rule_name="identity",
                                 remove_extra_whitespaces=False))


@pytest.fixture(scope="module")
def internlm_like(tmp_path_factory, corpus) -> Tokenizer:
    """As InternLM's: no space is put in front."""
    folder = tmp_path_factory.mktemp("internlm")
    return load_tokenizer(_train(folder, corpus[:60_000], normalization_rule_name="identity",
                                 remove_extra_whitespaces=False, add_dummy_prefix=False))


@pytest.fixture(scope="module")
def nfkc(spm_model) -> Tokenizer:
    """SentencePiece's default: NFKC, and runs of spaces become one."""
    return load_tokenizer(spm_model)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory, corpus) -> Tokenizer:
    """As GPT-2's and Falcon's: byte-level BPE in a tokenizer.json."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(corpus[:60_000].splitlines(), tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    folder = tmp_path_factory.mktemp("gpt2")
    bpe.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(params=["llama_like", "internlm_like", "nfkc", "byte_level"])
def tok(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_ids_are_those_of_sentencepiece(spm_model):
    tok = load_tokenizer(spm_model)
    bare = sentencepiece.SentencePieceProcessor(model_file=str(spm_model))
    for text in TEXTS:
        assert tok.encode(text) == bare.encode(text)
        assert tok.encode(text, bos=True, eos=True) == [1, *bare.encode(text), 2]
        assert tok.decode(tok.encode(text)) == bare.decode(bare.encode(text))
    assert tok.encode_batch(TEXTS) == [bare.encode(text) for text in TEXTS]
    assert tok.id_to_piece(1) == "<s>"
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id, tok.unk_id) == (512, 1, 2, -1, 0)
    assert tok.pad_or_substitute_id == 0
    assert tok.fingerprint == hashlib.sha256(spm_model.read_bytes()).hexdigest()


def test_arrays_are_the_lists(tok):
    for array, ids in zip(tok.encode_arrays(TEXTS), tok.encode_batch(TEXTS), strict=True):
        assert array.dtype == np.int32
        assert array.tolist() == ids


def test_text_is_never_read_as_a_special_token(tok):
    special = {tok.bos_id, tok.eos_id}
    for text in ("<s>", "</s>", "a</s>b", "<|endoftext|>"):
        assert not special & set(tok.encode(text))


def test_prompt_policy(spm_model):
    assert load_tokenizer(spm_model).encode_prompt("a")[0] == 1
    assert load_tokenizer(spm_model, add_bos=False).encode_prompt("a")[0] != 1
    assert load_tokenizer(spm_model, add_eos=True).encode_prompt("a")[-1] == 2


def test_decode_gives_the_text_back(llama_like, internlm_like, byte_level):
    for tok in (llama_like, internlm_like, byte_level):
        for text in TEXTS:
            assert tok.decode(tok.encode(text)) == text, tok.path


def test_decode_leaves_special_tokens_out_or_spells_them(llama_like, byte_level):
    ids = llama_like.encode("a b", bos=True, eos=True)
    assert llama_like.decode(ids) == "a b"
    assert llama_like.decode(ids, skip_special=False).replace(" ", "") == "<s>ab</s>"
    assert byte_level.decode([byte_level.eos_id, *byte_level.encode("a b")]) == "a b"


def test_offsets_lead_back_to_the_text(tok):
    for text in TEXTS:
        ids, offsets = tok.encode_with_offsets(text)
        assert ids == tok.encode(text)
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        starts = [start for start, _ in offsets]
        assert starts == sorted(starts)


def test_offsets_are_characters_of_the_text_before_normalization(nfkc):
    text = "ﬁne Ⅷ  答案 😀 end"
    _, offsets = nfkc.encode_with_offsets(text)
    assert offsets[-1][1] == len(text)  # neither bytes nor normalized characters
    assert "".join(text[start:end] for start, end in offsets).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("seed", range(5))
def test_parts_follow_the_characters(tok, seed):
    """The fast way (by spelling) and the sure way (by offsets) agree at every cut of any text."""
    rng = random.Random(seed)
    for text in [*TEXTS, "".join(TEXTS)]:
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 4)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids, counts = tok.encode_parts([parts])
        expected_ids, expected_counts = tok._parts_by_offsets(parts)
        assert ids.dtype == np.int32
        assert ids.tolist() == expected_ids.tolist() == tok.encode(text)
        assert counts.tolist() == expected_counts.tolist()
        assert counts.sum() == len(ids)


def test_rows_of_parts_are_the_rows_one_by_one(tok):
    rows = [[text[:3], text[3:7], text[7:]] for text in TEXTS] + [["", "x", ""], ["only ▁ one"], ["a", ""]]
    ids, counts = tok.encode_parts(rows)
    each = [tok.encode_parts([row]) for row in rows]
    assert ids.tolist() == [i for row_ids, _ in each for i in row_ids]
    assert counts.tolist() == [i for _, row_counts in each for i in row_counts]
    assert [len(array) for array in tok.encode_parts([])] == [0, 0]


def test_only_text_that_a_model_changes_takes_the_slow_way(llama_like, internlm_like, nfkc, monkeypatch):
    assert llama_like._tiles_text and internlm_like._tiles_text and not nfkc._tiles_text
    slow = []
    for tok in (llama_like, internlm_like):
        original = tok._parts_by_offsets
        monkeypatch.setattr(tok, "_parts_by_offsets", lambda parts, f=original: slow.append(parts) or f(parts))
        tok.encode_parts([[text[:2], text[2:]] for text in TEXTS])
        assert not slow
        tok.encode_parts([["good ", "row"], ["a literal ", "▁ counts as a space"], ["good ", "row"]])
        assert slow == [["a literal ", "▁ counts as a space"]]
        slow.clear()


def test_a_token_across_a_border_belongs_to_the_later_part(llama_like):
    whole = max(range(llama_like.vocab_size), key=lambda i: len(llama_like.id_to_piece(i)))
    word = llama_like.id_to_piece(whole).replace("▁", " ")
    ids = llama_like.encode(word)
    _, counts = llama_like.encode_parts([[word[:-1], word[-1:]]])
    assert counts.tolist() == [len(ids) - 1, 1]


def test_stream_is_decode_in_pieces(tok):
    for text in [*TEXTS, "".join(TEXTS)]:
        ids = tok.encode(text, bos=True)
        stream = tok.stream()
        pieces = [stream.push(token) for token in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == tok.decode(ids)


def test_stream_holds_an_unfinished_character_back(tok):
    ids = tok.encode("x😀")
    stream = tok.stream()
    shown = "".join(stream.push(token) for token in ids[:-1])
    assert shown == "x"
    assert stream.push(ids[-1]) == "😀"
    stream = tok.stream()
    assert "".join(stream.push(token) for token in ids[:-1]) + stream.flush() == tok.decode(ids[:-1])


def test_stream_gets_over_bytes_that_never_become_a_character(tok):
    broken = tok.encode("😀")[-1]
    stream = tok.stream()
    shown = "".join(stream.push(token) for token in [*[broken] * 12, *tok.encode("done")])
    assert "done" in shown + stream.flush()
    assert shown.count("\ufffd") >= 8  # they were not all kept to the end


def test_an_id_beyond_the_vocabulary(tok):
    with pytest.raises(UserError, match=f"{tok.vocab_size + 3}"):
        tok.decode([tok.vocab_size + 3])
    with pytest.raises(UserError, match="-1"):
        tok.stream().push(-1)


def test_names_are_looked_up_in_one_folder(spm_model, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_LLM_TOKENIZERS", str(tmp_path))
    (tmp_path / "llama2").mkdir()
    (tmp_path / "llama2" / "tokenizer.model").write_bytes(spm_model.read_bytes())
    assert load_tokenizer("llama2").path == tmp_path / "llama2" / "tokenizer.model"
    assert load_tokenizer("llama2_7b").path == tmp_path / "llama2" / "tokenizer.model"
    (tmp_path / "flat.model").write_bytes(spm_model.read_bytes())
    assert load_tokenizer("flat").path == tmp_path / "flat.model"
    with pytest.raises(UserError, match="RUN_LLM_TOKENIZERS"):
        load_tokenizer("falcon")


def test_special_names_beside_a_tokenizer_json(byte_level, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(byte_level.path.read_bytes())
    assert load_tokenizer(tmp_path).pad_id == -1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"pad_token": {"content": "<|endoftext|>"}, "bos_token": None, "eos_token": "a"}))
    tok = load_tokenizer(tmp_path)
    assert (tok.pad_id, tok.bos_id) == (0, -1)  # null is none, whatever usual name the vocabulary has
    assert tok.eos_id == tok.encode("a")[0]
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json: malformed JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "empty"),
        ("tokenizer.model", b"\x0a\x05 nothing of the kind", "not a SentencePiece model"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"[]", "not a tokenizer.json"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_truncated_model(spm_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(spm_model.read_bytes()[:-3])
    with pytest.raises(UserError, match="tokenizer.model: not a SentencePiece model, or damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", ["no/such/tokenizer.model", "tokenizer.json", "", "."])
def test_a_missing_file(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(missing)
