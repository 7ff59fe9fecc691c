"""Conversations: the ids that a model is given, what is forgotten when the context is full, the settings."""

import pytest

from llm_core.errors import UserError
from llm_core.infer.chat import changed_params
from llm_core.infer.history import History
from llm_core.infer.sampling import SamplingParams
from llm_core.text.chat import chat_format


def test_rounds_are_written_as_for_training(tokenizer):
    history = History(chat_format("vicuna_v1.1", tokenizer))
    history.add("Hi", " Hello ")
    ids = history.ids("And now?")
    assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1
    end = ids.index(tokenizer.eos_id)
    assert tokenizer.decode(ids[:end]).endswith("USER: Hi ASSISTANT: Hello")
    assert tokenizer.decode(ids[end:]) == "USER: And now? ASSISTANT:"
    assert "USER:" in history.format.stop_strings


def test_plain_history_is_one_text(tokenizer):
    history = History(chat_format("none", tokenizer))
    history.add("Once upon", " a time")
    assert history.ids("there was") == tokenizer.encode("Once upon a time\nthere was", bos=True)
    assert history.format.stop_strings == ()


def test_the_oldest_rounds_are_forgotten_first(tokenizer):
    history = History(chat_format("none", tokenizer))
    for number in range(10):
        history.add(f"question {number}", " word" * 10)
    room = len(history.ids("last")) // 2
    ids, dropped = history.fit("last", context=2 * room, room=room)
    assert len(ids) <= room
    assert 0 < dropped < 10
    assert history.rounds[0][0] == f"question {dropped}"
    with pytest.raises(UserError, match="this message has"):
        history.fit("word " * 100, context=50, room=10)
    assert history.rounds == []


def test_internlm_history_has_one_bos_and_no_eos(tokenizer):
    history = History(chat_format("internlm", tokenizer))
    history.add("Hi", "Hello ")
    ids = history.ids("And now?")
    assert (ids.count(tokenizer.bos_id), ids.count(tokenizer.eos_id)) == (1, 0)
    assert tokenizer.decode(ids).replace("> ", ">").count("<|Bot|>:") == 2


def test_settings_are_changed_by_name():
    params = SamplingParams()
    assert changed_params(params, "temperature 0.7").temperature == 0.7
    assert changed_params(params, "do_sample true").do_sample is True
    assert changed_params(params, " max_new_tokens  12").max_new_tokens == 12
    assert changed_params(params, "") == params
    for text, message in [
        ("temprature 1", "did you mean temperature"),
        ("top_k many", "not a number"),
        ("do_sample maybe", "True or False"),
        ("top_p 7", "within 0 and 1"),
    ]:
        with pytest.raises(UserError, match=message):
            changed_params(params, text)
