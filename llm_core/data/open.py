"""From the dataset section of a config to its loader."""

from __future__ import annotations

from typing import Any

from llm_core.data.loader import Loader
from llm_core.data.records import RecordFile
from llm_core.errors import UserError


def open_records(dataset: Any, kind: str) -> RecordFile:
    """The records of the `train_dataset` or `eval_dataset` section, as kind says. UserError if it names none."""
    path = dataset.data_loader.dataset_dir if dataset is not None else ""
    if not path:
        raise UserError(
            f"{kind}_dataset.data_loader.dataset_dir is empty: give a MindRecord file or folder with "
            f"--{kind}_dataset_dir"
        )
    return RecordFile(path)


def open_loader(config: Any, dataset: Any, kind: str) -> Loader:
    """The loader over them. An evaluation goes through all records once, in their order."""
    model = config.model.config
    records = open_records(dataset, kind)
    kinds = {manifest.get("kind") for manifest in records.manifests.values()}
    if "labels" in dataset.input_columns and "squad eval" in kinds:
        raise UserError(
            f"{records.path}: its labels are answers to be generated, not the tokens that follow the input, so there "
            "is no loss on them: measure EmF1Metric, or write it with squad_data_process.py --mode train"
        )
    return Loader(
        records,
        batch_size=config.runner_config.batch_size,
        seq_length=model.seq_length,
        columns=dataset.input_columns,
        shuffle=bool(dataset.data_loader.shuffle) and kind == "train",
        seed=config.seed if dataset.seed is None else dataset.seed,
        drop_remainder=bool(dataset.drop_remainder) and kind == "train",
        num_samples=dataset.data_loader.num_samples,
        vocab_size=model.vocab_size,
        kind=kind,
    )
