"""The searches as users ask for them: flags, a run file, the Python API, chat."""

import json

import numpy as np
import pytest

from llm_core.checkpoint.hf import to_hf
from llm_core.config import load_config
from llm_core.errors import UserError
from llm_core.infer.chat import Chat, changed_params
from llm_core.infer.history import History
from llm_core.infer.sampling import SamplingParams, sampling_params
from llm_core.text.chat import chat_format

BEAMS = {"model.model_config.num_beams": "4", "model.model_config.num_return_sequences": "2"}


@pytest.fixture(scope="module")
def model(run_file):
    from llm_core import api

    return api.load(run_file)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, net, spec):
    """The tiny model as a Hugging Face folder."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("hf")
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {to_hf(name): weight.asnumpy() for name, weight in net.parameters_and_names()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_predict_with_beams_from_the_command_line(run_file, model, tmp_path, capsys):
    from llm_core import cli

    arguments = ["--config", run_file, "--predict_data", "one", "two words", "--output_dir", tmp_path]
    for name, value in BEAMS.items():
        arguments += [f"--{name}", value]
    assert cli.main([str(argument) for argument in arguments]) == 0
    lines = [json.loads(line) for line in (tmp_path / "text_generation_result.jsonl").read_text("utf-8").splitlines()]
    assert [line["sequence"] for line in lines] == [0, 1, 0, 1]
    assert lines[0]["score"] >= lines[1]["score"] and lines[0]["score"] < 0
    texts = model.generate(["one", "two words"], num_beams=4, num_return_sequences=2)
    assert [line["text"] for line in lines] == texts


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"num_return_sequences": "3", "num_beams": "2"}, "no more answers than beams"),
        ({"num_beams": "4", "num_beam_groups": "2"}, "diversity_penalty 0"),
        ({"num_beams": "4", "assistant": "small.yaml"}, "can be assisted"),
        ({"penalty_alpha": "0.6", "top_k": "4", "do_sample": "True"}, "neither samples nor has beams"),
        ({"force_words": '["cat"]'}, "set num_beams to 2 or more"),
        ({"length_penalty": "2"}, "length_penalty 2.0 is of a search with beams, and num_beams is 1"),
        ({"early_stopping": "True", "do_sample": "True"}, "early_stopping True is of a search with beams"),
        ({"diversity_penalty": "0.5", "num_beams": "4"}, "set num_beam_groups above 1"),
        ({"penalty_alpha": "0.6", "top_k": "0", "do_sample": "False"}, "set top_k to 2 or more"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused_before_the_model_is_loaded(run_file, overrides, message):
    from llm_core.infer.run import predict

    values = {f"model.model_config.{name}": value for name, value in overrides.items()}
    loaded = load_config(run_file, [*values.items(), ("load_checkpoint", "nowhere"), ("predict_data", ["one"])])
    with pytest.raises(UserError, match=message):
        predict(loaded)


def test_a_refused_setting_is_named_with_its_place(run_file, tmp_path):
    text = run_file.read_text().replace("num_layers: 2", "num_layers: 2\n    length_penalty: 0.5")
    (tmp_path / "run.yaml").write_text(text)
    [line] = [number for number, each in enumerate(text.splitlines(), 1) if "length_penalty" in each]
    with pytest.raises(UserError, match=rf"^{tmp_path}/run.yaml:{line}: length_penalty 0.5 is of a search with beams"):
        sampling_params(load_config(tmp_path / "run.yaml"))
    flag = [("model.model_config.early_stopping", "never", "--model.model_config.early_stopping")]
    with pytest.raises(UserError, match="^--model.model_config.early_stopping: early_stopping never is of a search"):
        sampling_params(load_config(run_file, flag))


def test_a_run_file_says_every_setting(run_file):
    overrides = {
        "num_beams": "6", "num_beam_groups": "3", "diversity_penalty": "0.5", "length_penalty": "-1",
        "early_stopping": "never", "no_repeat_ngram_size": "3", "bad_words_ids": "[[5], [6, 7]]",
        "num_assistant_tokens": "7",
    }  # fmt: skip
    loaded = load_config(run_file, [(f"model.model_config.{name}", value) for name, value in overrides.items()])
    params = sampling_params(loaded)
    assert params.mode == "group"
    assert (params.diversity_penalty, params.length_penalty, params.early_stopping) == (0.5, -1, "never")
    assert (params.no_repeat_ngram_size, params.bad_words_ids) == (3, [[5], [6, 7]])
    assert params.num_assistant_tokens == 7
    words = [("model.model_config.num_beams", "3"), ("model.model_config.force_words", '["a", ["b", "c d"]]')]
    params = sampling_params(load_config(run_file, words))
    assert params.mode == "constrained" and params.force_words == ["a", ["b", "c d"]]
    with pytest.raises(UserError, match="early_stopping"):
        load_config(run_file, [("model.model_config.early_stopping", "sometimes")])


def test_forced_words_are_texts(model):
    forced = {"num_beams": 4, "max_new_tokens": 20}
    [text] = model.generate("one", **forced, force_words=["the", ["of", "in"]])
    assert "the" in text and ("of" in text or "in" in text)
    with pytest.raises(UserError, match="has no tokens"):
        model.generate("one", **forced, force_words=[""])
    with pytest.raises(UserError, match="give their ids: force_words_ids"):
        model.completer.generator.generate([[1]], SamplingParams(force_words=["the"], num_beams=2, max_new_tokens=3))


def test_stop_strings_cut_what_beams_have_found(model):
    [whole] = model.generate("one", num_beams=3, max_new_tokens=16)
    stop = whole[4:7]
    [[found]] = model.completer.complete(["one"], SamplingParams(num_beams=3, max_new_tokens=16, stop_strings=(stop,)))
    assert found.text == whole[: whole.index(stop)] and found.finish_reason == "stop"


def test_allowed_tokens_are_asked_for_by_the_number_of_the_prompt(model):
    asked = []

    def allowed(number, ids):
        asked.append((number, len(ids)))
        return [40 + number]

    params = SamplingParams(max_new_tokens=2, prefix_allowed_tokens_fn=allowed)
    answers = [item for [item] in model.completer.complete(["one", "two", "three"], params, batch_size=2)]
    assert [answer.token_ids for answer in answers] == [(40, 40), (41, 41), (42, 42)]
    assert {number for number, _ in asked} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["run file", "Hugging Face folder"])
def test_an_assistant_from_a_run_file_or_a_folder(run_file, hf_folder, model, kind):
    from llm_core import api

    assistant = str(run_file if kind == "run file" else hf_folder)
    helped = api.load(run_file, **{"model.model_config.assistant": assistant})
    assert helped.completer.assistant is not None
    plain = model.generate(["one", "two words"], max_new_tokens=20)
    assert helped.generate(["one", "two words"], max_new_tokens=20) == plain
    assert helped.completer.assistant.timing.first_token_seconds > 0  # it has been asked
    with pytest.raises(UserError, match="can be assisted"):
        helped.generate("one", num_beams=2)


def test_an_assistant_that_is_not_there_is_named(run_file):
    from llm_core.infer.load import load_completer

    with pytest.raises(UserError, match="model.model_config.assistant nowhere.yaml: "):
        load_completer(load_config(run_file, [("model.model_config.assistant", "nowhere.yaml")]))


def test_chat_writes_the_answer_of_a_search_with_beams(model, capsys):
    history = History(chat_format("none", model.completer.tokenizer))
    params = changed_params(SamplingParams(max_new_tokens=8), "num_beams 3 early_stopping never")
    Chat(model.completer, params, history, 0).answer("one")
    [expected] = model.generate("one", num_beams=3, max_new_tokens=8, early_stopping="never")
    assert capsys.readouterr().out.strip() == expected.strip()
    assert history.rounds[0][1].strip() == expected.strip()


def test_several_settings_at_once():
    params = changed_params(
        SamplingParams(do_sample=True), "do_sample False num_beams 4  num_beam_groups 2 diversity_penalty 1"
    )
    assert (params.mode, params.num_beams, params.early_stopping) == ("group", 4, False)
    assert changed_params(params, "early_stopping never").early_stopping == "never"
    for text, message in [
        ("num_beam_groups 3", "no multiple"),
        ("num_beams 1 num_beam_groups 1 diversity_penalty 0 length_penalty 2", "length_penalty 2.0 is of a search"),
        ("early_stopping maybe", "not True or False or never"),
        ("num_beams", "not a number"),
        ("num_beams 2 top", "did you mean top"),
    ]:
        with pytest.raises(UserError, match=message):
            changed_params(params, text)


def test_a_trained_prefix_goes_with_every_search():
    """Its columns are spread over beams and candidates, and the assistant's checks see them."""
    from mindspore import Tensor

    from llm_core.config.model_section import PTuning2Config
    from llm_core.infer.generate import Generator
    from llm_core.infer.scores import log_softmax
    from llm_core.models.spec import DecoderSpec
    from llm_core.peft.apply import build_net

    spec = DecoderSpec(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
        max_position=128, initializer_range=0.3,
    )  # fmt: skip
    net = build_net(spec, PTuning2Config(pet_type="ptuning2", pre_seq_len=3), seed=1).set_train(False)
    net.model.prefix.table.set_data(net.model.prefix.table * 100)
    generator = Generator(net, spec, eos_ids=[], pad_id=0)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    plain = generator.generate(prompts, SamplingParams(max_new_tokens=6))
    for answer in generator.generate(prompts, SamplingParams(max_new_tokens=6, num_beams=3, length_penalty=0.0)):
        ids = answer.prompt_ids + answer.token_ids
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        rows = log_softmax(net(Tensor(padded)).asnumpy()[0, len(answer.prompt_ids) - 1 :])
        own = sum(row[token] for row, token in zip(rows, answer.token_ids, strict=False))
        assert answer.score == pytest.approx(own, abs=1e-4)
    for settings in (
        {"penalty_alpha": 1e-7, "top_k": 3},
        {"assistant": Generator(net, spec, eos_ids=[], pad_id=0), "num_assistant_tokens": 3},
    ):
        answers = generator.generate(prompts, SamplingParams(max_new_tokens=6, **settings))
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
