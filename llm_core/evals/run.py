"""`--run_mode eval`: load_checkpoint measured on eval_dataset by what `metric` lists."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_core.config import LoadedConfig
from llm_core.data.open import open_loader, open_records
from llm_core.errors import UserError
from llm_core.evals import squad
from llm_core.evals.choice_prompts import read_choice_data
from llm_core.infer.results import write_whole
from llm_core.infer.sampling import SamplingParams, sampling_params
from llm_core.parallel.join import join_ranks
from llm_core.report.console import console
from llm_core.report.environment import save_run_record
from llm_core.signals import signals_blocked

if TYPE_CHECKING:
    from llm_core.parallel.comm import Comm

RESULT_NAME = "eval_result.json"
PREDICTIONS_NAME = "eval_predictions.jsonl"


def evaluate(loaded: LoadedConfig) -> int:
    """Measure, print the figures as MindFormers does, and write them to output_dir/eval_result.json; returns 0.

    Of several ranks, whose replicas share the data, rank 0 alone writes files. Raises UserError without load_checkpoint
    (random weights measure nothing) or without data, before MindSpore starts.
    """
    config = loaded.config
    metrics = {metric.type: metric for metric in config.metric}
    _require_measurable(loaded, metrics)
    if not config.load_checkpoint:
        raise UserError(
            f"{loaded.path}: load_checkpoint is not set, and random weights measure nothing: name a file, a "
            "folder, a training's output_dir or a Hugging Face model's folder with --load_checkpoint"
        )
    with signals_blocked(signal.SIGINT, signal.SIGTERM):  # for the threads that MindSpore starts
        comm = join_ranks(config, inference=True)
    rank, replica, replicas = (0, 0, 1) if comm is None else (comm.rank, comm.place.replica, comm.layout.dp)
    of_records = {"PerplexityMetric", "ClassificationMetric"} & metrics.keys()
    loader = open_loader(config, config.eval_dataset, "eval", replica, replicas) if of_records else None
    records = open_records(config.eval_dataset, "eval") if "EmF1Metric" in metrics else None
    params = sampling_params(loaded) if records is not None else None
    choices = read_choice_data(metrics["ChoiceMetric"]) if "ChoiceMetric" in metrics else None
    console.log_to(config.output_dir, rank)
    if rank == 0:
        save_run_record(config.output_dir, sys.argv, loaded.as_yaml())

    from llm_core.infer.load import load_pieces

    need_tokenizer = records is not None or choices is not None
    nets, spec, tokenizer = load_pieces(loaded, need_tokenizer=need_tokenizer, comm=comm)
    net = nets[0]
    result: dict[str, Any] = {
        "load_checkpoint": config.load_checkpoint,
        "eval_dataset": "" if config.eval_dataset is None else config.eval_dataset.data_loader.dataset_dir,
    }
    if config.adapter_id:
        result["adapter_id"] = config.adapter_id
    if "PerplexityMetric" in metrics:
        result["PerplexityMetric"] = _perplexity(config, nets, loader, comm)
    if "ClassificationMetric" in metrics:
        result["ClassificationMetric"] = _classification(loaded, net, loader, comm)
    if choices is not None:
        from llm_core.evals.choice_run import measure_choices

        result["ChoiceMetric"] = measure_choices(config, metrics["ChoiceMetric"], choices, net, tokenizer, comm)
    if records is not None:
        result["EmF1Metric"] = _em_f1(config, net, spec, tokenizer, records, params, comm)
    if rank == 0:
        path = Path(config.output_dir) / RESULT_NAME
        write_whole(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        console.info(f"written to {path}")
    if comm is not None:
        comm.gate()  # a process that ends takes MindSpore's connections with it
    return 0


def _require_measurable(loaded: LoadedConfig, metrics: dict[str, Any]) -> None:
    """UserError for a metric that the model's head has not, for two benchmarks at once, and for what a pipeline cannot
    measure."""
    stages = loaded.config.parallel_config.pipeline_stage if loaded.config.use_parallel else 1
    if stages > 1 and metrics.keys() - {"PerplexityMetric"}:
        raise UserError(
            f"{loaded.path}: parallel_config.pipeline_stage: {stages} stages measure PerplexityMetric alone, and "
            f"metric is {', '.join(sorted(metrics))}: set it to 1, and model_parallel or data_parallel instead"
        )
    if sum(metric.type == "ChoiceMetric" for metric in loaded.config.metric) > 1:
        raise UserError(
            f"{loaded.path}: metric: ChoiceMetric stands there more than once, and a run asks one benchmark: start "
            "a run for each, with an --output_dir of its own"
        )
    arch = loaded.config.model.arch.type
    fitting = {name for name in metrics if (name == "ClassificationMetric") != arch.endswith("ForCausalLM")}
    if fitting != metrics.keys():
        wrong = ", ".join(sorted(metrics.keys() - fitting))
        raise UserError(
            f"{loaded.path}: metric: {wrong} cannot be measured of {arch}: a classifier has ClassificationMetric, "
            "and a language model all the others"
        )


def _classification(loaded: LoadedConfig, net: Any, loader: Any, comm: Comm | None) -> dict[str, Any]:
    from llm_core.evals.classification import Classification
    from llm_core.models.heads import head_is_fresh

    if head_is_fresh(net):
        raise UserError(
            f"{loaded.path}: the weights hold no head of this classifier, and a fresh one measures nothing: give the "
            "output_dir of its training as load_checkpoint, or, of a training with an adapter, as --adapter_id"
        )
    measured = Classification(net, comm).measure(loader)
    console.result(measured.line())
    return measured.figures()


def _perplexity(config: Any, nets: list[Any], loader: Any, comm: Comm | None) -> dict[str, Any]:
    from llm_core.evals.perplexity import Perplexity

    model = config.model.config
    ids = {"pad_token_id": model.pad_token_id, "ignore_token_id": model.ignore_token_id}
    measured = Perplexity(nets, **ids, comm=comm).measure(loader)
    console.result(measured.mindformers_line())
    console.result(measured.per_batch_line())
    return {
        "loss": measured.loss,
        "PPL": measured.ppl,
        "tokens": measured.tokens,
        "per_batch": {"loss": measured.per_batch_loss, "PPL": measured.per_batch_ppl, "batches": measured.batches},
    }


def _em_f1(
    config: Any, net: Any, spec: Any, tokenizer: Any, records: Any, params: SamplingParams, comm: Comm | None
) -> dict[str, Any]:
    from llm_core.evals.answers import answer_questions, read_questions
    from llm_core.infer.generate import Generator
    from llm_core.infer.load import end_ids

    model = config.model.config
    if not params.greedy:
        console.warn("do_sample is True, so EM and F1 are partly chance; --do_sample False measures the model alone")
    num_samples = config.eval_dataset.data_loader.num_samples
    questions = read_questions(records, tokenizer, model.pad_token_id, num_samples)
    generator = Generator(net, spec, eos_ids=end_ids(model), pad_id=model.pad_token_id)
    options = {"seed": config.seed, "batch_size": config.runner_config.batch_size, "comm": comm}
    predictions = answer_questions(generator, tokenizer, questions, params, **options)
    # Upstream's records carry the first answer only; the official score takes the best of all.
    cmrc = squad.cmrc_scores(predictions, [question.golds[:1] for question in questions])
    official = squad.squad_scores(predictions, [question.golds for question in questions])
    console.result(f"F1 score: {cmrc.f1}, Em score: {cmrc.em}, total_count: {cmrc.total}")
    console.result(f"SQuAD 1.1 (official): F1 {official.f1:.3f}, EM {official.em:.3f}, {official.total} questions")
    if comm is None or comm.rank == 0:
        _write_predictions(Path(config.output_dir) / PREDICTIONS_NAME, questions, predictions)
    return {
        "cmrc": {"F1": cmrc.f1, "Em": cmrc.em},
        "squad": {"F1": official.f1, "EM": official.em},
        "total_count": cmrc.total,
    }


def _write_predictions(path: Path, questions: Sequence[Any], predictions: Sequence[str]) -> None:
    """One line a question, so that one can see what the scores are made of."""
    lines = [
        {"record": question.record, "id": question.id, "prediction": prediction, "answers": question.golds}
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
