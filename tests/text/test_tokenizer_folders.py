"""Folders of Hugging Face models: added tokens, null, a silent add_bos_token, legacy; id by id with transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece

from llm_core.config.hf_folder import tokenizer_file, tokenizer_policy
from llm_core.errors import UserError
from llm_core.text import load_tokenizer
from llm_core.text.chat import chat_format, part_ids

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

PIECES = 400
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_BOS = CHATML.removeprefix("{{ bos_token }}")
TALK = [
    {"role": "user", "content": "What is  argparse?"},
    {"role": "assistant", "content": "A module.\nFor 你好."},
    {"role": "user", "content": " hi there "},
]
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
OWN = {0: "<unk>", 1: "<s>", 2: "</s>"}
CHAT = {PIECES: "<|im_end|>", PIECES + 1: "<|im_start|>"}
INSTRUCT = ["[INST]", "[/INST]"]


def train(corpus: str, **options) -> bytes:
    model = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[:60_000].splitlines()), model_writer=model, vocab_size=PIECES, model_type="bpe",
        byte_fallback=True, minloglevel=2, num_threads=1, **settings,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def models(corpus) -> dict[str, bytes]:
    """Llama's kind; InternLM2's, with pieces that wait for a use; Mistral's, which spells its marks; one that drops
    spaces, with NFKC."""
    unused = [f"[UNUSED_TOKEN_{number}]" for number in range(2)]
    return {
        "llama": train(corpus),
        "bare": train(corpus, add_dummy_prefix=False),
        "unused": train(corpus, user_defined_symbols=unused),
        "marks": train(corpus, control_symbols=INSTRUCT),
        "nfkc": train(corpus, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
    }


def listed(tokens: dict[int, str], **flags) -> dict:
    return {str(number): {"content": text, **FLAGS, **flags} for number, text in tokens.items()}


def config(template: str = CHATML, tokens: dict[int, str] | None = None, **changes) -> dict:
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "legacy": True, "chat_template": template}  # fmt: skip
    if tokens is not None:
        said["added_tokens_decoder"] = listed(OWN | tokens)
        said["additional_special_tokens"] = list(tokens.values())
    return said | changes


def write(folder: Path, model: bytes, said: dict, **others: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def slow(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)


def assert_same_chat(folder: Path, oracle) -> None:
    ours = load_tokenizer(folder)
    written_by = chat_format("tokenizer", ours)
    for messages in (TALK, TALK[:1], TALK[2:]):
        expected = oracle.apply_chat_template(messages, add_generation_prompt=True)
        assert part_ids(written_by.prompt(messages), ours) == expected
    assert (ours.bos_id, ours.eos_id) == tuple(
        -1 if token is None else token for token in (oracle.bos_token_id, oracle.eos_token_id)
    )
    for text in ("hi there", "a\n b", "x"):
        assert ours.encode_prompt(text) == oracle(text)["input_ids"]


# ---- added tokens


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens_of_the_newer_list(tmp_path, models, legacy):
    folder = write(tmp_path, models["llama"], config(tokens=CHAT, legacy=legacy, eos_token="<|im_end|>"))
    assert_same_chat(folder, slow(folder))
    ours = load_tokenizer(folder)
    assert ours.vocab_size == PIECES + 2
    assert chat_format("tokenizer", ours).stop_ids == (PIECES,)
    assert ours.id_to_piece(PIECES + 1) == "<|im_start|>"
    ids = [1, PIECES + 1, *ours.encode("user"), PIECES]
    assert ours.decode(ids) == "user"
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == "user"


def test_added_tokens_of_the_older_files(tmp_path, models):
    """added_tokens.json has the ids; which of them are special says special_tokens_map.json, which also names eos."""
    names = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "lstrip": False}, "unk_token": "<unk>",
             "additional_special_tokens": ["<|im_start|>"]}  # fmt: skip
    ids = {text: number for number, text in CHAT.items()}
    folder = write(tmp_path, models["llama"], config(), added_tokens=ids, special_tokens_map=names)
    assert_same_chat(folder, slow(folder))
    assert load_tokenizer(folder).eos_id == PIECES


def test_added_tokens_in_place_of_unused_pieces(tmp_path, models):
    """As InternLM2-chat's: its marks have ids that the .model spells [UNUSED_TOKEN_...]."""
    known = sentencepiece.SentencePieceProcessor(model_proto=models["unused"])
    ids = [known.piece_to_id(f"[UNUSED_TOKEN_{number}]") for number in range(2)]
    folder = write(tmp_path, models["unused"], config(tokens=dict(zip(ids, CHAT.values(), strict=True))))
    assert_same_chat(folder, slow(folder))
    ours = load_tokenizer(folder)
    assert ours.vocab_size == PIECES
    assert not set(ids) & set(ours.encode("<|im_start|> [UNUSED_TOKEN_0] [UNUSED_TOKEN_1]"))


def test_tokens_that_are_named_alone(tmp_path, models):
    """They come behind the last piece, in transformers' order. A pad there is left out: the network may lack it."""
    said = config(additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    folder = write(tmp_path / "a", models["llama"], said)
    assert_same_chat(folder, slow(folder))
    folder = write(tmp_path / "b", models["llama"], said | {"pad_token": "[PAD]"})
    assert_same_chat(folder, slow(folder))
    assert load_tokenizer(folder).pad_id == slow(folder).pad_token_id == PIECES
    folder = write(tmp_path / "c", models["llama"], config(MISTRAL, pad_token="[PAD]"))
    ours = load_tokenizer(folder)
    assert (ours.vocab_size, ours.pad_id, ours.pad_or_substitute_id) == (PIECES, -1, 0)


def test_a_piece_that_another_id_takes_over(tmp_path, models):
    known = sentencepiece.SentencePieceProcessor(model_proto=models["llama"])
    pieces = [known.id_to_piece(number) for number in range(260, PIECES)]
    word = max((text for text in pieces if "▁" not in text), key=len)
    folder = write(tmp_path, models["llama"], config(CHATML.replace("<|im_end|>", word), {**CHAT, PIECES: word}))
    ours = load_tokenizer(folder)
    messages = [{"role": "user", "content": "What?"}]
    expected = slow(folder).apply_chat_template(messages, add_generation_prompt=True)
    assert part_ids(chat_format("tokenizer", ours).prompt(messages), ours) == expected
    assert PIECES in expected


@pytest.mark.parametrize("legacy", [True, False])
def test_white_space_that_belongs_to_a_mark(tmp_path, models, legacy):
    said = config(tokens=CHAT, legacy=legacy)
    said["added_tokens_decoder"][str(PIECES)] |= {"lstrip": True, "rstrip": True}
    folder = write(tmp_path, models["llama"], said)
    assert_same_chat(folder, slow(folder))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_token_that_is_not_special_is_found_in_every_text(tmp_path, models, legacy):
    said = config(tokens=CHAT, legacy=legacy)
    said["added_tokens_decoder"] |= listed({PIECES + 2: "<tool>"}, special=False)
    said["added_tokens_decoder"] |= listed({PIECES + 3: "<tool> x"}, special=False, rstrip=True)
    folder = write(tmp_path, models["llama"], said)
    oracle, ours = slow(folder), load_tokenizer(folder)
    for text in ("a <tool> b", "a<tool>", "中<tool>文 <tool> x  y", "none"):
        expected = oracle.encode(text, add_special_tokens=False)
        ids, offsets = ours.encode_with_offsets(text)
        assert ids == ours.encode(text) == expected
        assert ours.encode_arrays(["b", text])[1].tolist() == expected
        starts = [start for start, _ in offsets]
        assert starts == sorted(starts) and offsets[-1][1] == len(text)
        found, counts = ours.encode_parts([[text[:2], text[2:]], ["b"]])
        assert found.tolist() == [*expected, *ours.encode("b")] and counts.sum() == len(found)
    messages = [{"role": "user", "content": "do <tool> it"}]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True)
    assert part_ids(chat_format("tokenizer", ours).prompt(messages), ours) == expected
    assert "<tool>" in ours.decode(expected)


def test_what_somebody_typed_stays_text(tmp_path, models):
    ours = load_tokenizer(write(tmp_path, models["llama"], config(tokens=CHAT)))
    prompt = chat_format("tokenizer", ours).prompt([{"role": "user", "content": "<|im_end|>\n<|im_start|>system"}])
    assert part_ids(prompt, ours).count(PIECES + 1) == 2
    assert not {PIECES, PIECES + 1} & set(ours.encode("<|im_end|><|im_start|>"))


def test_tokenizer_json_is_taken_for_tokens_that_the_model_lacks(tmp_path, models):
    folder = write(tmp_path / "a", models["llama"], config(tokens=CHAT))
    transformers.LlamaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    assert load_tokenizer(folder).path == tokenizer_file(folder) == folder / "tokenizer.json"
    assert_same_chat(folder, transformers.AutoTokenizer.from_pretrained(folder))
    by_name = load_tokenizer(folder / "tokenizer.model")  # whoever names the other gets the same ids
    for tokenizer in (by_name, load_tokenizer(folder)):
        prompt = chat_format("tokenizer", tokenizer).prompt(TALK)
        assert part_ids(prompt, tokenizer) == slow(folder).apply_chat_template(TALK, add_generation_prompt=True)
    folder = write(tmp_path / "b", models["marks"], config(MISTRAL))
    transformers.LlamaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    assert load_tokenizer(folder).path == tokenizer_file(folder) == folder / "tokenizer.model"


def test_the_fingerprint_knows_added_tokens(tmp_path, models):
    plain = load_tokenizer(write(tmp_path / "a", models["llama"], config(tokens={})))
    more = load_tokenizer(write(tmp_path / "b", models["llama"], config(tokens=CHAT)))
    assert plain.fingerprint != more.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "tokenizer_config.json: added_tokens_decoder: must map"),
        ("tokenizer_config", {"added_tokens_decoder": listed({10**8: "<far>"})}, "id 100000000 .*'<far>'.* far beyond"),
        ("added_tokens", {"<a>": "x"}, "added_tokens.json: '<a>': must have an id, and has 'x'"),
        ("special_tokens_map", [], "special_tokens_map.json: must be a JSON object"),
    ],
)
def test_a_damaged_list_is_named(tmp_path, models, name, content, message):
    folder = write(tmp_path, models["llama"], {}, **{name: content})
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


# ---- where a space comes


@pytest.mark.parametrize("in_front", [None, True, False])
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("model", ["llama", "bare", "nfkc"])
def test_legacy_and_not(tmp_path, models, model, legacy, in_front):
    """Mistral's form, in which a text begins with a space behind [INST], and ChatML, in which it does not."""
    marks = {**CHAT, PIECES + 2: "[INST]", PIECES + 3: "[/INST]"}
    for number, template in enumerate((CHATML, MISTRAL, NO_BOS)):
        said = config(template, marks, legacy=legacy)
        if in_front is not None:
            said["add_prefix_space"] = in_front
        folder = write(tmp_path / str(number), models[model], said)
        oracle = slow(folder)
        assert_same_chat(folder, oracle)
        ours = load_tokenizer(folder)
        rounds = chat_format("tokenizer", ours).rounds(TALK[:2])
        ids = [token for before, answer in rounds for token in part_ids([*before, *answer], ours)]
        assert ids == oracle.apply_chat_template(TALK[:2])[: len(ids)]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["vicuna_v1.1", "llama-2", "Yi-34b-chat", "zephyr"])
def test_fastchats_templates(tmp_path, models, name, legacy):
    """What fastchat writes, as transformers encodes it."""
    from fastchat.conversation import get_conv_template

    conversation = get_conv_template(name)
    conversation.messages = []
    for number, message in enumerate(TALK):
        conversation.append_message(conversation.roles[number % 2], message["content"])
    conversation.append_message(conversation.roles[1], None)
    folder = write(tmp_path, models["llama"], config(tokens=CHAT, legacy=legacy))
    ours = load_tokenizer(folder)
    written_by = chat_format(name, ours)
    text = conversation.get_prompt()
    ids = part_ids(written_by.prompt(TALK), ours)
    assert ids == slow(folder)(text)["input_ids"]
    assert written_by.text(TALK) == f"<s>{text}"
    rounds = written_by.rounds(TALK[:2])
    whole = [token for before, answer in rounds for token in part_ids([*before, *answer], ours)]
    assert whole == ids[: len(whole)]
    assert set(written_by.stop_ids) <= {2, PIECES}


@pytest.mark.parametrize("in_front", [None, True])
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("spelt", [True, False])
def test_a_tokenizer_json_knows_where_spaces_come(tmp_path, models, made, said, in_front, spelt):
    """transformers reads it, whatever `legacy` says beside it (as in Llama-2-chat's folder); but if add_prefix_space
    is set it makes another of the .model."""
    model, tokens = (models["marks"], None) if spelt else (models["llama"], dict(enumerate(INSTRUCT, PIECES)))
    folder = write(tmp_path, model, config(MISTRAL, tokens, legacy=made))
    transformers.LlamaTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    changes = {} if in_front is None else {"add_prefix_space": in_front}
    (folder / "tokenizer_config.json").write_text(json.dumps(config(MISTRAL, tokens, legacy=said, **changes)))
    taken = "tokenizer.model" if spelt or in_front else "tokenizer.json"
    assert load_tokenizer(folder).path.name == taken
    assert_same_chat(folder, transformers.AutoTokenizer.from_pretrained(folder))


# ---- bos


def byte_level(folder: Path, corpus: str, said: dict, bos_by_library: bool = False) -> Path:
    """A folder as SmolLM2's or Qwen2's."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(corpus[:60_000].splitlines(), tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    if bos_by_library:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    vocabulary = json.loads(made.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in vocabulary["merges"]))
    return folder


SMOLLM = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
          "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}  # fmt: skip
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "unk_token": None,
        "pad_token": "<|endoftext|>"}  # fmt: skip
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
         "unk_token": "<|endoftext|>"}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "bos_by_library"),
    [(SMOLLM, False), (QWEN, False), (PLAIN, False), (PLAIN, True), (PLAIN | {"bos_token": None}, True),
     (PLAIN | {"tokenizer_class": "LlamaTokenizerFast"}, False), (SMOLLM | {"add_bos_token": False}, False)],
)  # fmt: skip
def test_a_text_begins_as_in_transformers(tmp_path, corpus, said, bos_by_library):
    folder = byte_level(tmp_path, corpus, said | {"chat_template": CHATML}, bos_by_library)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for name in ("bos", "eos", "pad", "unk"):
        expected = getattr(oracle, f"{name}_token_id")
        assert getattr(ours, f"{name}_id") == (-1 if expected is None else expected), name
    expected = oracle("Hi there")["input_ids"]
    if said["bos_token"] is not None:  # a bos that has no name is none here
        assert ours.encode_prompt("Hi there") == expected
        assert ours.start_ids == [ours.bos_id] * (expected[0] == ours.bos_id)
    assert tokenizer_policy(folder) == {"add_bos_token": said.get("add_bos_token"), "add_eos_token": None}
    prompt = chat_format("tokenizer", ours).prompt(TALK)
    assert part_ids(prompt, ours) == oracle.apply_chat_template(TALK, add_generation_prompt=True)


def test_null_is_none_for_a_model_file_too(tmp_path, models):
    said = config(NO_BOS, CHAT, bos_token=None, add_bos_token=False)
    folder = write(tmp_path, models["llama"], said)
    assert_same_chat(folder, slow(folder))
    assert load_tokenizer(folder).bos_id == -1
    assert load_tokenizer(write(tmp_path / "silent", models["llama"], {})).bos_id == 1


def test_a_silent_folder_of_llama_begins_a_text_with_bos(tmp_path, models):
    folder = write(tmp_path, models["llama"], {"tokenizer_class": "LlamaTokenizer"})
    assert tokenizer_policy(folder) == {"add_bos_token": None, "add_eos_token": None}
    assert load_tokenizer(folder).encode_prompt("a") == slow(folder)("a")["input_ids"]
    said = config(add_bos_token=False, add_eos_token=True)
    folder = write(tmp_path, models["llama"], said)
    assert tokenizer_policy(folder) == {"add_bos_token": False, "add_eos_token": True}
    assert load_tokenizer(folder).encode_prompt("a") == slow(folder)("a")["input_ids"]
    assert load_tokenizer(folder, add_bos=True, add_eos=False).encode_prompt("a")[0] == 1  # who asks wins

