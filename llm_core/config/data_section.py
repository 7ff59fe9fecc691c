"""The dataset sections."""

from typing import Literal

from llm_core.config.section import Section, key

Column = Literal["input_ids", "labels"]


class DataLoaderSection(Section):
    """Where records come from."""

    type: Literal["MindDataset"] = key("MindDataset", "MindRecord files.")
    dataset_dir: str = key(
        "", "A MindRecord file, or a folder of them. --train_dataset_dir and --eval_dataset_dir set it."
    )
    shuffle: bool = key(True, "Shuffle, in an order that seed and epoch decide.")
    num_samples: int | None = key(None, "Use the first so many records only; null = all.", ge=1)


class DatasetSection(Section):
    """A dataset. Its batch size is runner_config.batch_size."""

    data_loader: DataLoaderSection = key(..., "Where records come from.")
    input_columns: list[Column] = key(
        ["input_ids"], "Columns read; with labels, only what they mark carries loss.", min_length=1
    )
    drop_remainder: bool = key(True, "Drop the last, short batch; False = it counts with what it has.")
    seed: int | None = key(None, "Seed of the shuffle; null = the run's seed.", ge=0)


class DatasetTask(Section):
    """MindFormers' second mention of a dataset; checked, and read from train_dataset or eval_dataset."""

    type: Literal["CausalLanguageModelDataset"] = key("CausalLanguageModelDataset", "The task.")
    dataset_config: DatasetSection | None = key(None, "The same dataset, as an alias: *train_dataset or *eval_dataset.")
