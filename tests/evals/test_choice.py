"""MMLU and CMMLU: reading, prompts, letters, scores against Hugging Face's logits, and whole runs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_core.config import load_config
from llm_core.data.choices import ChoiceQuestion, read_choice_file, read_choice_folder
from llm_core.errors import UserError
from llm_core.evals.choice import ChoiceScorer, ChoiceWriter, LetterIds, letter_ids
from llm_core.evals.choice_prompts import choice_prompt, found_letter, letter_is_certain, read_choice_data
from llm_core.evals.choice_run import Answered, summarize
from llm_core.evals.run import evaluate
from llm_core.evals.subjects import CHINA_SPECIFIC, CHINESE_NAMES, CMMLU, MMLU, categories_of
from llm_core.models.decoder import CausalLM
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.text import load_tokenizer

MMLU_DEV = 'What is 1 + 1?,1,2,3,4,B\n"Which, if any,\nis a dog?",cat,dog,cow,owl,B\nWho?,me,you,he,she,D\n'
CMMLU_TEST = ",Question,A,B,C,D,Answer\n0,哪个部位？,胸,腹,大腿,小腿,C\n1,几个？,一,二,三,四,A\n"


def write_mmlu(root: Path, subjects: tuple[str, ...] = ("anatomy", "formal_logic", "sociology")) -> Path:
    for part in ("dev", "test"):
        (root / part).mkdir(parents=True)
        for number, subject in enumerate(subjects):
            rows = [f"Question {number}{n} of {part}?,one,two,three,four,{'ABCD'[(n + number) % 4]}" for n in range(4)]
            (root / part / f"{subject}_{part}.csv").write_text("\n".join(rows) + "\n")
    return root


# ---------------------------------------------------------------------------------------------------------- reading


def test_both_forms_of_csv(tmp_path):
    (tmp_path / "anatomy_dev.csv").write_text(MMLU_DEV)
    (tmp_path / "agronomy.csv").write_text(CMMLU_TEST)
    folder = read_choice_folder(tmp_path)
    assert {subject: len(rows) for subject, rows in folder.items()} == {"anatomy": 3, "agronomy": 2}
    assert folder["anatomy"][1].question == "Which, if any,\nis a dog?"
    assert folder["anatomy"][2].place.endswith("anatomy_dev.csv:4")  # a question of two lines stands before it
    assert folder["agronomy"][0] == ChoiceQuestion(
        "agronomy", "哪个部位？", ("胸", "腹", "大腿", "小腿"), "C", f"{tmp_path / 'agronomy.csv'}:2"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q?,1,2,3,4,B\nQ?,1,2,3,4,E\n", r"a.csv:2: the answer is 'E', and must be one of A, B, C, D"),
        ("Q?,1,2,3,B\n", r"a.csv:1: 5 columns; a row holds question, a, b, c, d, answer"),
        (",Question,A,B,C,Answer\n0,Q?,1,2,3,A\n", r"a.csv:1: has no column d"),
        (",Question,A,B,C,D,Answer\n0,Q?,1,2,3\n", r"a.csv:2: 5 columns"),
        (",Question,A,B,C,D,Answer\n", r"a.csv: a header and no question"),
        (" ,1,2,3,4,A\n", r"a.csv:1: the question is empty"),
        (", ,,\n\n,,,\n", r"a.csv: nothing but empty cells"),
        ('Q?,1,2,3,4,A\n"Q?,1\n', r"a.csv:2: no CSV"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_choice_file(tmp_path / "a.csv")


def test_folders(tmp_path):
    root = write_mmlu(tmp_path / "mmlu")
    section = SimpleNamespace(path=str(root), split="test", shots=2, num_samples=3)
    data = read_choice_data(section)
    assert [len(rows) for rows in data.questions.values()] == [3, 3, 3] and len(data.examples["anatomy"]) == 4
    assert not data.chinese
    section.path = str(root / "test")  # the files themselves, with dev/ beside their folder
    assert read_choice_data(section) == data
    (root / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(UserError, match="shots is 2, and the examples in .*dev are fewer: no for anatomy; .* shots 0"):
        read_choice_data(section)
    with pytest.raises(UserError, match="neither a folder val nor a .csv file .dev, test."):
        read_choice_data(SimpleNamespace(path=str(root), split="val", shots=0, num_samples=None))
    with pytest.raises(UserError, match="ChoiceMetric has no path"):
        read_choice_data(SimpleNamespace(path="", split="val", shots=0, num_samples=None))


def test_files_of_one_subject_do_not_replace_each_other(tmp_path):
    for part in ("dev", "test"):
        (tmp_path / f"anatomy_{part}.csv").write_text(MMLU_DEV)
    with pytest.raises(UserError, match="anatomy_test.csv: of the same subject as anatomy_dev.csv; .*folders dev/"):
        read_choice_data(SimpleNamespace(path=str(tmp_path), split="test", shots=0, num_samples=None))


def test_more_shots_than_examples(tmp_path):
    root = write_mmlu(tmp_path / "mmlu", ("anatomy", "sociology"))
    (root / "dev" / "anatomy_dev.csv").write_text(MMLU_DEV)
    section = SimpleNamespace(path=str(root), split="test", shots=4, num_samples=None)
    with pytest.raises(UserError, match="shots is 4, and .*dev are fewer: 3 for anatomy; add .*, or set shots 3"):
        read_choice_data(section)
    section.shots = 3
    assert len(read_choice_data(section).examples["anatomy"]) == 3


# ---------------------------------------------------------------------------------------------------------- prompts


def test_the_prompt_of_mmlu(tmp_path):
    (tmp_path / "college_biology_dev.csv").write_text(MMLU_DEV)
    first, second, third = read_choice_file(tmp_path / "college_biology_dev.csv")
    assert choice_prompt(third, [first, second], chinese=False, shots=1).text == (
        "The following are multiple choice questions (with answers) about college biology.\n\n"
        "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Who?\nA. me\nB. you\nC. he\nD. she\nAnswer:"
    )
    own = choice_prompt(second, [first, second, third], chinese=False, shots=2)
    assert own.shots == 2 and own.text.count("is a dog?") == 1 and "Who?" in own.text  # never its own example


def test_the_prompt_of_cmmlu(tmp_path):
    (tmp_path / "agronomy.csv").write_text(CMMLU_TEST)
    first, second = read_choice_file(tmp_path / "agronomy.csv")
    assert choice_prompt(second, [first], chinese=True, shots=5).text == (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"
        "哪个部位？\nA. 胸\nB. 腹\nC. 大腿\nD. 小腿\n答案： C\n\n"
        "几个？\nA. 一\nB. 二\nC. 三\nD. 四\n答案："
    )


def test_subjects():
    assert len(MMLU) == 57
    assert Counter(MMLU.values()) == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert len(CMMLU) == len(CHINESE_NAMES) == 67 and len(CHINA_SPECIFIC) == 15
    assert categories_of("ethnology", chinese=True) == ["social sciences", "China specific"]
    assert categories_of("anatomy", chinese=True) == ["STEM"] and categories_of("anatomy", chinese=False) == ["other"]
    assert categories_of("my own", chinese=False) == ["other"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" C.", "C"), ("(D) because", "D"), ("The answer is B.", "B"), ("答案是C。", "C"), ("选A", "A"),
        ("A is right", "A"), ("A cat is C", "C"), ("A. one", "A"),
        ("A because it is", "A"), ("A since B is not", "A"), ("A and not B", "A"), ("A android is B", "B"),
        ("Dogs and Cats", ""), ("B2 or AB", ""), ("", ""),
    ],
)  # fmt: skip
def test_letters_in_answers(text, letter):
    assert found_letter(text) == letter


def test_an_answer_goes_on_until_its_letter_is_certain():
    assert not letter_is_certain("A") and not letter_is_certain("A c") and not letter_is_certain("A cat")
    assert letter_is_certain("B. tw") and letter_is_certain("A is ")
    for unfinished in ("B", "A ", "A is", "A as", "A since", "A and"):  # Bad, A issue, A astute, A sincere, A android
        assert not letter_is_certain(unfinished)
    assert letter_is_certain("A and ") and letter_is_certain("A.")


# ----------------------------------------------------------------------------------------------------------- scores

SPEC = DecoderSpec(
    vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    max_position=160, initializer_range=0.3,
)  # fmt: skip


def test_letter_ids(spm_model):
    tokenizer = load_tokenizer(spm_model)
    ids = letter_ids(tokenizer, "Answer:")
    for letter, end in zip("ABCD", ids.ends, strict=True):
        assert [*ids.shared, *end] == [1, *tokenizer.encode(f"Answer: {letter}")]
    assert len({end[0] for end in ids.ends}) > 1 and min(map(len, ids.ends)) >= 1
    assert ids.length == max(len(ids.shared) + len(end) for end in ids.ends)


@pytest.mark.parametrize("ends", [((7,), (8,), (9,), (10,)), ((7,), (8, 20), (8, 21), (9, 3, 4))])
def test_scores_as_hugging_face(ends):
    """Letters of one token (one row a question), and of several (a row each); rows of unequal length, a short batch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from llm_core.checkpoint.hf import to_hf

    net = CausalLM(SPEC, seed=3)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=160, rms_norm_eps=SPEC.norm_eps,
    )).eval()  # fmt: skip
    weights = {to_hf(name): torch.from_numpy(p.asnumpy()) for name, p in net.parameters_dict().items()}
    theirs.load_state_dict(weights)

    random = np.random.RandomState(0)
    prompts = [LetterIds(random.randint(3, 512, length).astype(np.int32), ends) for length in (5, 70, 64, 31, 9)]
    scores = ChoiceScorer(net, batch_size=2).scores(prompts)
    for prompt, found in zip(prompts, scores, strict=True):
        for end, score in zip(ends, found, strict=True):
            ids = torch.tensor([[*prompt.shared, *end]])
            with torch.no_grad():
                every = torch.log_softmax(theirs(ids).logits[0].double(), -1)
            first = len(prompt.shared) - 1
            wanted = sum(float(every[first + n, token]) for n, token in enumerate(end))
            assert abs(score - wanted) < 1e-4 * max(1, abs(wanted))


def test_figures():
    def answered(subject: str, right: bool, letter: str = "A") -> Answered:
        question = ChoiceQuestion(subject, "?", ("1", "2", "3", "4"), "A" if right else "B", "f:1")
        return Answered(choice_prompt(question, [], chinese=True, shots=0), letter)

    rows = [answered("anatomy", right) for right in (True, False)]
    rows += [answered("ethnology", True) for _ in range(3)] + [answered("ethnology", False, letter="")]
    figures = summarize(rows, chinese=True)
    assert figures["questions"] == 6 and figures["answered"] == pytest.approx(5 / 6)
    assert figures["micro"] == pytest.approx(4 / 6) and figures["macro"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert figures["categories"]["China specific"]["accuracy"] == figures["subjects"]["ethnology"]["accuracy"] == 0.75
    assert figures["categories"]["STEM"] == {"accuracy": 0.5, "answered": 1.0, "questions": 2}


# ------------------------------------------------------------------------------------------------------------- runs

RUN = """
run_mode: eval
runner_config: {batch_size: 4}
context: {device_target: CPU}
model:
  arch: {type: LlamaForCausalLM}
  model_config:
    {type: LlamaConfig, vocab_size: 512, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 24,
     seq_length: 256, initializer_range: 1.0, compute_dtype: float32, param_init_type: float32, max_new_tokens: 5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """run.yaml, model.safetensors, mmlu/{dev,test}."""
    folder = tmp_path_factory.mktemp("choice")
    (folder / "run.yaml").write_text(RUN)
    net = CausalLM(spec_from_config(load_config(folder / "run.yaml").config.model), seed=1)
    save_file({name: p.asnumpy() for name, p in net.parameters_dict().items()}, folder / "model.safetensors")
    write_mmlu(folder / "mmlu")
    return folder


def measure(folder: Path, output: Path, spm_model: Path, metric: str, **more: str) -> dict:
    given = {
        "load_checkpoint": str(folder / "model.safetensors"), "output_dir": str(output),
        "processor.tokenizer.vocab_file": str(spm_model),
        "metric": f"{{type: ChoiceMetric, path: {folder / 'mmlu'}, {metric}}}",
    }  # fmt: skip
    loaded = load_config(folder / "run.yaml", list((given | more).items()))
    loaded.require_runnable(prompts=False)  # without eval_dataset
    assert evaluate(loaded) == 0
    return json.loads((output / "eval_result.json").read_text())["ChoiceMetric"]


@pytest.mark.parametrize("method", ["likelihood", "generation"])
def test_a_run(folder, tmp_path, spm_model, capsys, method):
    result = measure(folder, tmp_path, spm_model, f"shots: 1, method: {method}")
    assert result["questions"] == 12 and result["shots"] == 1 and result["too_long"] == result["with_fewer_shots"] == 0
    lines = [json.loads(line) for line in (tmp_path / "choice_predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {line["shots"] for line in lines} == {1}
    assert result["micro"] == pytest.approx(np.mean([line["prediction"] == line["answer"] for line in lines]))
    assert result["answered"] == pytest.approx(np.mean([line["prediction"] != "" for line in lines]))
    if method == "likelihood":
        assert result["answered"] == 1.0
        assert all(line["prediction"] == max(line["scores"], key=line["scores"].get) for line in lines)
    else:
        assert all(line["prediction"] == found_letter(line["text"]) for line in lines)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["subject", "category", "right", "answered", "questions"]
    assert any(line.startswith("formal_logic") and "humanities" in line for line in out)
    assert any(line.startswith(f"{method}, 1 shot: micro ") for line in out)
    assert (tmp_path / "choice.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_too_long_loses_examples_and_then_counts_as_wrong(folder, tmp_path, spm_model, capsys):
    tokenizer = load_tokenizer(spm_model)
    data = read_choice_data(SimpleNamespace(path=str(folder / "mmlu"), split="test", shots=4, num_samples=None))
    question, examples = data.questions["anatomy"][0], data.examples["anatomy"]
    lengths = [letter_ids(tokenizer, choice_prompt(question, examples, False, shots).text).length for shots in range(5)]
    few = {"model.model_config.seq_length": str(lengths[2] + 3)}  # room for two or three
    result = measure(folder, tmp_path / "few", spm_model, "shots: 4", **few)
    assert result["with_fewer_shots"] == 12 and result["too_long"] == 0
    lines = [json.loads(line) for line in (tmp_path / "few/choice_predictions.jsonl").read_text().splitlines()]
    assert {line["shots"] for line in lines} <= {1, 2, 3}
    none = {"model.model_config.seq_length": str(lengths[0] - 5)}
    result = measure(folder, tmp_path / "none", spm_model, "shots: 0", **none)
    assert result["too_long"] > 0 and result["answered"] == 1 - result["too_long"] / 12
    assert "too long for the model and count as wrong" in capsys.readouterr().err


def test_prompts_and_ids_are_shown_with_v(folder, tmp_path, spm_model, capsys, monkeypatch):
    from llm_core.report.console import console

    monkeypatch.setattr(console, "verbosity", 1)
    measure(folder, tmp_path, spm_model, "num_samples: 1")
    shown = capsys.readouterr().err
    assert "Question 00 of test?\nA. one" in shown and "ids [1, " in shown and "right is A" in shown


def test_a_classifier_has_no_letters(folder, tmp_path):
    text = RUN.replace("LlamaForCausalLM", "LlamaForSequenceClassification") + "metric: {type: ChoiceMetric, path: x}\n"
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match="ChoiceMetric cannot be measured of LlamaForSequenceClassification"):
        evaluate(load_config(tmp_path / "run.yaml", [("load_checkpoint", str(folder / "model.safetensors"))]))


def test_rows_do_not_depend_on_the_batch():
    net = CausalLM(replace(SPEC, num_layers=1), seed=1)
    random = np.random.RandomState(1)
    prompts = [LetterIds(random.randint(3, 512, n).astype(np.int32), ((7,), (8,), (9,), (10,))) for n in (5, 70, 64)]
    alone, together = (ChoiceScorer(net, batch_size=size).scores(prompts) for size in (1, 3))
    assert np.abs(alone - together).max() < 1e-4


def test_written_answers_are_asked_for_as_predict_does(folder, spm_model, monkeypatch):
    """InternLMProcessor makes the prompt a chat."""
    from llm_core.infer.generate import Generator

    seen = []
    monkeypatch.setattr(Generator, "generate", lambda self, prompts, *rest, **more: seen.extend(prompts) or [])
    config = load_config(folder / "run.yaml", [("processor.type", "InternLMProcessor")]).config
    tokenizer = load_tokenizer(spm_model)
    net = CausalLM(spec_from_config(config.model), seed=1)
    writer = ChoiceWriter(config, net, tokenizer)
    writer.answers(["Who?\nAnswer:"])
    assert writer._params.stop_strings == ("<eoa>", "<|User|>:")  # text to this tokenizer, which has no such ids
    assert tokenizer.decode(seen[0]).startswith("<|User|>:Who?") and "<|Bot|>:" in tokenizer.decode(seen[0])


def test_a_run_asks_one_benchmark(folder):
    two = "[{type: ChoiceMetric, path: x}, {type: ChoiceMetric, path: y}]"
    with pytest.raises(UserError, match="ChoiceMetric stands there more than once"):
        evaluate(load_config(folder / "run.yaml", [("metric", two)]))
