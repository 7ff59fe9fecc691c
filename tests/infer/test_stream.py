"""Text that grows token by token: what is shown is final, and joins to the decoded whole."""

import pytest

from llm_core.infer.stream import TextStream

TEXT = "The déjà vu of naïve 漢字 and 🙂 emoji, USER: stop here. More text."


def pushed(stream, ids):
    return [stream.push(token) for token in ids] + [stream.finish()]


def test_pieces_join_to_the_text_behind_the_prompt(tokenizer):
    ids = tokenizer.encode("Once upon a time" + TEXT, bos=True)
    for cut in (1, 3, len(ids) - 4):
        stream = TextStream(tokenizer, ids[:cut])
        pieces = pushed(stream, ids[cut:])
        assert tokenizer.decode(ids[:cut]) + "".join(pieces) == tokenizer.decode(ids)
        assert stream.text == "".join(pieces)
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_answer_keeps_the_space_before_its_first_word(tokenizer):
    prompt, word = tokenizer.encode("a cat", bos=True), tokenizer.encode("sat")
    assert "".join(pushed(TextStream(tokenizer, prompt), word)) == " sat"
    assert "".join(pushed(TextStream(tokenizer, [tokenizer.bos_id]), word)) == "sat"


@pytest.mark.parametrize("stop", ["USER:", " stop here", "🙂", "e", "ER: st"])
def test_a_stop_string_is_cut_however_tokens_lie(tokenizer, stop):
    ids = tokenizer.encode(TEXT, bos=True)
    stream = TextStream(tokenizer, ids[:1], ["never there", stop])
    pieces = pushed(stream, ids[1:])
    assert stream.stopped
    assert "".join(pieces) == stream.text == TEXT[: TEXT.index(stop)]


def test_the_earliest_of_two_stop_strings_counts(tokenizer):
    ids = tokenizer.encode("one two three", bos=True)
    stream = TextStream(tokenizer, ids[:1], ["three", "two"])
    pushed(stream, ids[1:])
    assert stream.text == "one "


def test_text_is_held_only_while_it_may_become_a_stop_string(tokenizer):
    ids = tokenizer.encode("abc### x", bos=True)
    stream = TextStream(tokenizer, ids[:1], ["###END"])
    pieces = pushed(stream, ids[1:])
    assert not stream.stopped
    assert "".join(pieces) == "abc### x"
    assert all("#" not in piece or "x" in piece or " " in piece for piece in pieces)
    ending = TextStream(tokenizer, ids[:1], ["###END"])
    assert "".join(pushed(ending, tokenizer.encode("abc###"))) == "abc###"


def test_unfinished_bytes_do_not_reach_the_screen_before_the_end(tokenizer):
    ids = tokenizer.encode("🙂", bos=True)
    stream = TextStream(tokenizer, ids[:1])
    assert "".join(stream.push(token) for token in ids[1:-1]).strip() == ""
    assert "\ufffd" in stream.finish()
