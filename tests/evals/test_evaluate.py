"""run_mode eval from a YAML to eval_result.json, and the answers that EM/F1 are made of."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_core.config import load_config
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.disk import sha256
from llm_core.errors import UserError
from llm_core.evals.answers import answer_questions, read_questions
from llm_core.evals.run import evaluate
from llm_core.evals.squad import first_line
from llm_core.infer.generate import Generator
from llm_core.infer.sampling import SamplingParams
from llm_core.models.decoder import CausalLM
from llm_core.models.spec import spec_from_config
from llm_core.text import load_tokenizer

LENGTH = 24
RUN = """
seed: 7
run_mode: eval
runner_config: {batch_size: 3}
context: {device_target: CPU}
model:
  arch: {type: LlamaForCausalLM}
  model_config:
    {type: LlamaConfig, vocab_size: 512, hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 24,
     seq_length: 24, max_position_embedding: 64, do_sample: False, max_new_tokens: 6, initializer_range: 1.0,
     compute_dtype: float32, param_init_type: float32}
eval_dataset:
  data_loader: {dataset_dir: ''}
  input_columns: ['input_ids']
"""
TEXTS = ["What is a module?", "Who calls a function, and when?", "Name the exception that open raises."]
GOLDS = [["a file"], ["the interpreter", "Python, at run time"], ["OSError", "FileNotFoundError", "an OSError"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spm_model) -> Path:
    """run.yaml, model.safetensors, text.mindrecord, questions.mindrecord."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "run.yaml").write_text(RUN)
    config = load_config(folder / "run.yaml").config
    net = CausalLM(spec_from_config(config.model), seed=1)
    save_file({name: p.asnumpy() for name, p in net.parameters_dict().items()}, folder / "model.safetensors")
    ids = np.random.default_rng(0).integers(3, 512, (7, LENGTH)).astype(np.int32)
    with RecordWriter(folder / "text.mindrecord", columns={"input_ids": LENGTH}) as writer:
        writer.write_rows({"input_ids": ids})
    write_questions(folder / "questions.mindrecord", spm_model)
    return folder


def write_questions(path: Path, spm_model: Path, **manifest) -> None:
    tokenizer = load_tokenizer(spm_model)
    prompts = [tokenizer.encode(text[:14], bos=True) for text in TEXTS]
    answers = [tokenizer.encode(golds[0]) for golds in GOLDS]
    with RecordWriter(path, columns={"input_ids": LENGTH, "labels": LENGTH}, manifest=manifest) as writer:
        writer.write_rows({"input_ids": padded(prompts), "labels": padded(answers)})


def padded(rows: list[list[int]]) -> np.ndarray:
    array = np.zeros((len(rows), LENGTH), np.int32)
    for row, ids in zip(array, rows, strict=True):
        row[: len(ids)] = ids
    return array


def load(folder: Path, output: Path, **overrides: str):
    given = {"load_checkpoint": str(folder / "model.safetensors"), "output_dir": str(output)} | overrides
    return load_config(folder / "run.yaml", list(given.items()))


def test_perplexity_run(folder, tmp_path, capsys):
    data = str(folder / "text.mindrecord")
    assert evaluate(load(folder, tmp_path, **{"eval_dataset.data_loader.dataset_dir": data})) == 0
    result = json.loads((tmp_path / "eval_result.json").read_text())
    figures = result["PerplexityMetric"]
    assert figures["tokens"] == 7 * (LENGTH - 1) and figures["per_batch"]["batches"] == 3
    assert figures["PPL"] == pytest.approx(np.exp(figures["loss"]))
    line = {"PerplexityMetric": {"loss": figures["loss"], "PPL": figures["PPL"]}}
    assert f"PerplexityMetric = {line}" in capsys.readouterr().out.splitlines()
    assert (tmp_path / "run" / "config.yaml").exists()
    assert "PerplexityMetric = " in (tmp_path / "log/rank_0/info.log").read_text()


def test_both_metrics_in_one_run(folder, tmp_path, capsys, spm_model):
    assert evaluate(load(folder, tmp_path, **{
        "eval_dataset.data_loader.dataset_dir": str(folder / "questions.mindrecord"),
        "metric": "[{type: PerplexityMetric}, {type: EmF1Metric}]",
        "processor.tokenizer.vocab_file": str(spm_model),
    })) == 0
    result = json.loads((tmp_path / "eval_result.json").read_text())
    assert result["PerplexityMetric"]["loss"] > 0 and result["EmF1Metric"]["total_count"] == 3
    cmrc = result["EmF1Metric"]["cmrc"]
    assert f"F1 score: {cmrc['F1']}, Em score: {cmrc['Em']}, total_count: 3" in capsys.readouterr().out.splitlines()
    predictions = [json.loads(line) for line in (tmp_path / "eval_predictions.jsonl").read_text().splitlines()]
    assert [line["answers"] for line in predictions] == [golds[:1] for golds in GOLDS]


def test_perplexity_of_answers_is_refused(folder, tmp_path, spm_model):
    path = tmp_path / "questions.mindrecord"
    write_questions(path, spm_model, kind="squad eval")
    with pytest.raises(UserError, match="EmF1Metric"):
        evaluate(load(folder, tmp_path, **{
            "eval_dataset.data_loader.dataset_dir": str(path), "eval_dataset.input_columns": "[input_ids, labels]",
        }))  # fmt: skip


def test_without_a_checkpoint(folder, tmp_path):
    with pytest.raises(UserError, match="load_checkpoint is not set.*--load_checkpoint"):
        evaluate(load(folder, tmp_path, load_checkpoint=""))


def test_without_data(folder, tmp_path):
    with pytest.raises(UserError, match="--eval_dataset_dir"):
        evaluate(load(folder, tmp_path))


def test_questions_come_with_all_right_answers(folder, tmp_path, spm_model):
    path, tokenizer = tmp_path / "q.mindrecord", load_tokenizer(spm_model)
    write_questions(path, spm_model)
    alone = read_questions(RecordFile(path), tokenizer, pad_token_id=0)
    assert [question.golds for question in alone] == [golds[:1] for golds in GOLDS]  # from column labels
    assert alone[0].prompt_ids == tokenizer.encode(TEXTS[0][:14], bos=True)

    beside = write_golds(tmp_path / "q.mindrecord.golds.jsonl", GOLDS)
    write_questions(path, spm_model, side_files=beside, tokenizer={"sha256": tokenizer.fingerprint})
    questions = read_questions(RecordFile(path), tokenizer, pad_token_id=0)
    assert [(question.id, question.golds) for question in questions] == [(f"q{n}", g) for n, g in enumerate(GOLDS)]
    assert len(read_questions(RecordFile(path), tokenizer, pad_token_id=0, num_samples=2)) == 2

    odd = [["one\u2028line", "next\x85"], *GOLDS[1:]]  # no line ends to JSON
    beside = write_golds(tmp_path / "q.mindrecord.golds.jsonl", odd)
    write_questions(path, spm_model, side_files=beside)
    assert [q.golds for q in read_questions(RecordFile(path), tokenizer, pad_token_id=0)] == odd


def write_golds(path: Path, golds: list[list[str]]) -> dict:
    """The file of right answers, and the entry of the manifest for it."""
    rows = [{"record": n, "id": f"q{n}", "answers": answers} for n, answers in enumerate(golds)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}}


def test_right_answers_that_do_not_fit(tmp_path, spm_model):
    path, side, tokenizer = tmp_path / "q.mindrecord", tmp_path / "q.mindrecord.golds.jsonl", load_tokenizer(spm_model)
    write_questions(path, spm_model, side_files=write_golds(side, GOLDS[:2]))
    with pytest.raises(UserError, match="golds.jsonl: not the right answers of the 3 records"):
        read_questions(RecordFile(path), tokenizer, pad_token_id=0)
    side.write_text("other")
    with pytest.raises(UserError, match="golds.jsonl: .*(not what was written|bytes)"):
        read_questions(RecordFile(path), tokenizer, pad_token_id=0)


def test_questions_of_another_tokenizer(tmp_path, spm_model):
    wrote = {"file": "other.model", "sha256": "0" * 64, "vocab_size": 32000}
    write_questions(tmp_path / "q.mindrecord", spm_model, tokenizer=wrote)
    with pytest.raises(UserError, match=r"another tokenizer \(other.model, 32000 tokens\)"):
        read_questions(RecordFile(tmp_path / "q.mindrecord"), load_tokenizer(spm_model), pad_token_id=0)


def test_records_without_answers(folder, spm_model):
    with pytest.raises(UserError, match="no column labels.*squad_data_process"):
        read_questions(RecordFile(folder / "text.mindrecord"), load_tokenizer(spm_model), pad_token_id=0)


@pytest.fixture(scope="module")
def generator(folder):
    spec = spec_from_config(load_config(folder / "run.yaml").config.model)
    return Generator(CausalLM(spec, seed=1), spec, eos_ids=[2], pad_id=0)


def test_answers_are_first_lines_whatever_the_batch(folder, generator, spm_model):
    tokenizer = load_tokenizer(spm_model)
    questions = read_questions(RecordFile(folder / "questions.mindrecord"), tokenizer, pad_token_id=0)
    params = SamplingParams(max_new_tokens=6)
    alone = answer_questions(generator, tokenizer, questions, params, seed=0, batch_size=1)
    together = answer_questions(generator, tokenizer, questions, params, seed=0, batch_size=2)
    assert alone == together
    for question, answer in zip(questions, alone, strict=True):
        (generation,) = generator.generate([question.prompt_ids], params)
        whole = tokenizer.decode([*question.prompt_ids, *(t for t in generation.token_ids if t != 2)])
        assert answer == first_line(whole[len(tokenizer.decode(question.prompt_ids)):])


def test_a_question_draws_the_same_whatever_stands_beside_it(folder, generator, spm_model):
    """With the run's seed and the record's number, as predict would: neither batch nor neighbours change it."""
    tokenizer = load_tokenizer(spm_model)
    questions = read_questions(RecordFile(folder / "questions.mindrecord"), tokenizer, pad_token_id=0)
    params = SamplingParams(do_sample=True, temperature=2.0, max_new_tokens=8)

    def answers(some, batch_size, seed=11):
        return answer_questions(generator, tokenizer, some, params, seed=seed, batch_size=batch_size)

    every = answers(questions, 3)
    assert answers(questions, 1) == answers(questions, 2) == every
    assert [answers([question], 3)[0] for question in questions] == every
    assert answers(questions, 3, seed=12) != every
    for question, answer in zip(questions, every, strict=True):
        (drawn,) = generator.generate([question.prompt_ids], params, seed=11 + question.record)
        begun = tokenizer.decode(question.prompt_ids)
        whole = tokenizer.decode([*question.prompt_ids, *(t for t in drawn.token_ids if t != 2)])
        assert answer == first_line(whole[len(begun):])


def test_a_prompt_without_room_names_its_record(folder, generator, spm_model):
    tokenizer = load_tokenizer(spm_model)
    questions = read_questions(RecordFile(folder / "questions.mindrecord"), tokenizer, pad_token_id=0)
    with pytest.raises(UserError, match="record 0: .*max_new_tokens 60"):
        answer_questions(generator, tokenizer, questions, SamplingParams(max_new_tokens=60), seed=0, batch_size=2)


def test_an_adapter_is_measured_with_its_base(folder, tmp_path, spm_model):
    """Perplexity, EM/F1 and the choices of base and adapter are those of the merged weights."""
    base = load_file(folder / "model.safetensors")
    random = np.random.default_rng(4)
    adapter, merged = {}, dict(base)
    for name in ("wq", "wv"):
        layer = f"model.layers.0.attention.{name}"
        a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((2, 16), (16, 2)))
        adapter |= {f"{layer}.mindpet_delta_lora_a": a, f"{layer}.mindpet_delta_lora_b": b}
        merged[f"{layer}.weight"] = base[f"{layer}.weight"] + 4 / 2 * b @ a
    save_file(adapter, tmp_path / "adapter.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "anatomy_dev.csv").write_text("".join(f"{n}?,1,2,3,4,{'ABCD'[n % 4]}\n" for n in range(6)))
    choice = f"{{type: ChoiceMetric, path: {tmp_path}, split: dev}}"
    common = {
        "eval_dataset.data_loader.dataset_dir": str(folder / "questions.mindrecord"),
        "metric": f"[{{type: PerplexityMetric}}, {{type: EmF1Metric}}, {choice}]",
        "processor.tokenizer.vocab_file": str(spm_model), "model.model_config.max_position_embedding": "128",
    }  # fmt: skip
    pet = "{pet_type: lora, lora_rank: 2, lora_alpha: 4, target_modules: 'wq|wv'}"
    runs = {
        "base": {},
        "adapter": {"adapter_id": str(tmp_path / "adapter.safetensors"), "model.model_config.pet_config": pet},
        "merged": {"load_checkpoint": str(tmp_path / "merged.safetensors")},
    }
    results, scores = {}, {}
    for name, given in runs.items():
        assert evaluate(load(folder, tmp_path / name, **common, **given)) == 0
        results[name] = json.loads((tmp_path / name / "eval_result.json").read_text())
        lines = (tmp_path / name / "choice_predictions.jsonl").read_text().splitlines()
        scores[name] = np.array([list(json.loads(line)["scores"].values()) for line in lines])
    losses = {name: result["PerplexityMetric"]["loss"] for name, result in results.items()}
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-5) and losses["base"] != losses["merged"]
    assert results["adapter"]["EmF1Metric"] == results["merged"]["EmF1Metric"]
    assert np.abs(scores["adapter"] - scores["merged"]).max() < 1e-4 < np.abs(scores["base"] - scores["merged"]).max()
