"""`--run_mode predict`, the Python API, chat and the script, over a tiny model in files."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_core.config import load_config
from llm_core.errors import UserError
from llm_core.infer.load import load_for_inference

ROOT = Path(__file__).parents[2]


def command_line(arguments, **kwargs):
    """Run run_llm.py as a user does."""
    return subprocess.run(
        [sys.executable, ROOT / "run_llm.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def model(run_file):
    from llm_core import api

    return api.load(run_file)


@pytest.fixture(scope="module")
def predicted(run_file, tmp_path_factory):
    """One run over four prompts, with quotes and spaces, in batches of three."""
    output = tmp_path_factory.mktemp("predict")
    prompts = ['Say "hi"', "two  spaces", "", "it's"]
    arguments = ["--config", run_file, "--predict_data", *prompts, "--predict_batch_size", 3, "--output_dir", output]
    return prompts, output, command_line(arguments)


def test_predict_writes_and_prints_every_answer(predicted):
    prompts, output, done = predicted
    assert done.returncode == 0, done.stderr
    literal = ast.literal_eval((output / "text_generation_result.txt").read_text("utf-8"))
    lines = [json.loads(line) for line in (output / "text_generation_result.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert [item["text_generation_text"] for item in literal] == [[line["prompt"] + line["text"]] for line in lines]
    assert all(line["new_tokens"] == 8 and line["finish_reason"] == "length" for line in lines)
    assert [line["seed"] for line in lines] == [5, 6, 7, 8]
    for line in lines:
        assert line["prompt"] + line["text"] in done.stdout
    assert "tokens/s" in done.stderr and str(output / "text_generation_result.txt") in done.stderr
    assert (output / "run" / "command.txt").exists()


def test_the_api_gives_the_same_answers(predicted, model):
    prompts, output, _ = predicted
    lines = [json.loads(line) for line in (output / "text_generation_result.jsonl").read_text("utf-8").splitlines()]
    assert model.generate(prompts) == [line["text"] for line in lines]


def test_the_api_as_documented(model):
    sampled = model.generate("one", do_sample=True, temperature=2.0, num_return_sequences=2, max_new_tokens=3, seed=1)
    assert len(sampled) == 2
    assert sampled == model.generate(
        "one", do_sample=True, temperature=2.0, num_return_sequences=2, max_new_tokens=3, seed=1
    )
    ids = model.completer.tokenizer.encode("one", bos=True)
    logits = model.logits("one")
    assert logits.shape == (len(ids), 512)
    [[completion]] = model.completer.complete(["one"], model.params)
    assert completion.token_ids[0] == logits[-1].argmax()
    with pytest.raises(UserError, match="top_p"):
        model.generate("one", top_p=3)


def test_stop_strings_end_an_answer(model):
    [whole] = model.generate("one", max_new_tokens=20)
    stop = whole[5:8]
    [[completion]] = model.completer.complete(["one"], model.params.__class__(max_new_tokens=20, stop_strings=(stop,)))
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) < 20


def test_a_too_long_prompt_is_named_before_anything_is_generated(model):
    with pytest.raises(UserError, match=r"prompt 'x x x .*\.\.\.': the prompt has \d+ tokens"):
        list(model.completer.complete(["fine", "x " * 300], model.params))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"load_checkpoint": ""}, "name the weights with --load_checkpoint"),
        ({"load_checkpoint": "nowhere"}, "nowhere"),
        ({"processor.tokenizer.vocab_file": ""}, "vocab_file is not set"),
        ({"processor.tokenizer.vocab_file": "nowhere.model"}, "nowhere.model"),
        ({"model.model_config.vocab_size": "500"}, "has 512 tokens and the model only 500"),
        ({"model.model_config.eos_token_id": "[2, 512]"}, "eos_token_id 512"),
        ({"model.model_config.hidden_size": "64"}, "shape"),
    ],
)
def test_what_does_not_fit_is_refused(run_file, overrides, message):
    with pytest.raises(UserError, match=message):
        load_for_inference(load_config(run_file, list(overrides.items())))


def test_a_user_error_is_one_message_and_rc_2(run_file, tmp_path):
    done = command_line(["--config", run_file, "--predict_data", "missing.txt", "--output_dir", tmp_path / "o"])
    assert done.returncode == 2
    assert "missing.txt: no such file" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_chat_over_a_pipe(run_file):
    typed = "Hello\n/set temperatur 1\n/set max_new_tokens 3\n/nonsense\nAgain\n/reset\n/template none\nHello\n"
    done = command_line(["chat", "--config", run_file], input=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for note in ("format vicuna_v1.1", "did you mean temperature", "max_new_tokens 3", "/nonsense", "format none"):
        assert note in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_answers_the_three_fixed_prompts(run_file, tmp_path):
    script = ROOT / "scripts" / "run_llm_predict.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT_DIR": str(tmp_path / "a b")}
    weights = run_file.parent / "weights.safetensors"
    done = subprocess.run(
        ["bash", script, "single", run_file, weights], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = ast.literal_eval((tmp_path / "a b" / "text_generation_result.txt").read_text("utf-8"))
    prompts = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]
    assert len(results) == 3
    for prompt, result in zip(prompts, results, strict=True):
        assert result["text_generation_text"][0].startswith(prompt)


@pytest.mark.parametrize("arguments", [[], ["single", "a"], ["both", "a", "b"], ["parallel", "a", "b", "zero"]])
def test_the_script_refuses_wrong_arguments(arguments):
    script = ROOT / "scripts" / "run_llm_predict.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_nothing_imports_mindspore_before_the_environment_is_set():
    """OMP_WAIT_POLICY counts only if it is there when MindSpore is imported: runtime.start does both."""
    modules = ["api"]
    modules += [f"infer.{name}" for name in ("run", "chat", "load", "complete", "results", "sampling", "scores")]
    code = f"import sys; [__import__('llm_core.' + name) for name in {modules}]; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_internlm_processor_wraps_prompts_and_answers_are_saved(run_file, marked_spm, tmp_path):
    from llm_core import api

    tokenizer = {"processor.tokenizer.vocab_file": str(marked_spm), "processor.type": "InternLMProcessor"}
    wrapped = api.load(run_file, **tokenizer)
    assert wrapped.completer.chat_format.name == "internlm"
    ids = wrapped.completer.encode(["Hi"], wrapped.params)[0]
    known = {token.text: token.ids[0] for token in wrapped.completer.tokenizer.special_tokens}
    assert ids[0] == 1 and ids.count(known["<eoh>"]) == 1
    [[completion]] = wrapped.completer.complete(["Hi"], wrapped.params)
    assert completion.prompt.startswith("<s><|User|>:Hi<eoh>")
    assert known["<eoa>"] in wrapped.completer.chat_format.stop_ids
    assert wrapped.generate([]) == []
    plain = api.load(run_file, **tokenizer, **{"processor.chat_template": "none"})
    assert plain.completer.encode(["Hi"], plain.params)[0] == [1, *plain.completer.tokenizer.encode("Hi")]

    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}, "Hi"]))
    flags = [word for key, value in tokenizer.items() for word in (f"--{key}", value)]
    arguments = ["--config", run_file, "--predict_data", rows, "--output_dir", tmp_path, "--save_file"]
    done = command_line([*arguments, tmp_path / "new" / "results.npy", *flags])
    assert done.returncode == 0, done.stderr
    answers = np.load(tmp_path / "new" / "results.npy")
    pairs = json.loads((tmp_path / "new" / "results.npy.json").read_text(encoding="utf-8"))
    assert [pair["answer"] for pair in pairs] == answers.tolist()
    assert pairs[0]["prompt"].startswith("<s><|User|>:Add\n1 2<eoh>")


def test_an_answer_ends_at_the_formats_mark(generator, tokenizer):
    """The first token that the model writes is declared the mark: then the answer is empty."""
    from llm_core.infer.complete import Completer
    from llm_core.infer.sampling import SamplingParams
    from llm_core.text.chat import PlainFormat

    format = PlainFormat(tokenizer)
    params = SamplingParams(do_sample=False, max_new_tokens=5)
    [[free]] = Completer(generator, tokenizer).complete(["Hello"], params)
    format.stop_ids = (free.token_ids[0],)
    [[ended]] = Completer(generator, tokenizer, format).complete(["Hello"], params)
    assert (ended.text, ended.finish_reason, ended.token_ids) == ("", "eos", free.token_ids[:1])
    [[again]] = Completer(generator, tokenizer).complete(["Hello"], params)
    assert again.token_ids == free.token_ids  # the mark was one call's
