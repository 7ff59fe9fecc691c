"""From the dataset section of a config to its loader."""

from __future__ import annotations

from typing import Any

from llm_core.data.loader import Loader
from llm_core.data.records import RecordFile
from llm_core.errors import UserError
from llm_core.models.spec import head_of


def open_records(dataset: Any, kind: str) -> RecordFile:
    """The records of the `train_dataset` or `eval_dataset` section, as kind says. UserError if it names none."""
    path = dataset.data_loader.dataset_dir if dataset is not None else ""
    if not path:
        raise UserError(
            f"{kind}_dataset.data_loader.dataset_dir is empty: give a MindRecord file or folder with "
            f"--{kind}_dataset_dir"
        )
    return RecordFile(path)


def open_loader(config: Any, dataset: Any, kind: str, rank: int = 0, world: int = 1) -> Loader:
    """The loader over them. An evaluation goes through all records once, in their order.

    rank, world: of data parallelism, whose ranks share the rows of every batch.
    """
    model, head = config.model.config, head_of(config.model.arch.type)
    records = open_records(dataset, kind)
    kinds = {manifest.get("kind") for manifest in records.manifests.values()}
    if "labels" in dataset.input_columns and "squad eval" in kinds:
        raise UserError(
            f"{records.path}: its labels are answers to be generated, not the tokens that follow the input, so there "
            "is no loss on them: measure EmF1Metric, or write it with squad_data_process.py --mode train"
        )
    _require_fitting_labels(records, dataset.input_columns, kinds, head)
    return Loader(
        records,
        batch_size=config.runner_config.batch_size,
        seq_length=model.seq_length,
        columns=dataset.input_columns,
        shuffle=bool(dataset.data_loader.shuffle) and kind == "train",
        seed=config.seed if dataset.seed is None else dataset.seed,
        drop_remainder=bool(dataset.drop_remainder) and kind == "train",
        num_samples=dataset.data_loader.num_samples,
        rank=rank,
        world=world,
        vocab_size=model.vocab_size,
        num_labels=None if head == "causal" else model.num_labels,
        kind=kind,
    )


def _require_fitting_labels(records: RecordFile, columns: list[str], kinds: set[str], head: str) -> None:
    """UserError where a classifier would read token ids as classes, or a language model classes as token ids."""
    if head != "causal" and "labels" not in columns:
        raise UserError(
            f"{records.path}: input_columns are {columns}, and a classifier learns from labels: set input_columns "
            "[input_ids, labels], and write the records with tools/dataset_preprocess/mrpc_process.py"
        )
    if head == "causal" and "labels" in columns and "classification" in kinds:
        raise UserError(
            f"{records.path}: its labels are classes, and the model predicts tokens: set model.arch.type "
            "...ForSequenceClassification"
        )
