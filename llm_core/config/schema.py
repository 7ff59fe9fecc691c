"""The whole run file: `RunConfig`. Its field descriptions are the help, the documentation and the JSON Schema."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from llm_core.config.data_section import DatasetSection, DatasetTask
from llm_core.config.device_section import ContextSection, ParallelConfig, ParallelSection, RecomputeConfig, check_env
from llm_core.config.model_section import ModelSection, ProcessorSection
from llm_core.config.section import Section, key
from llm_core.config.train_section import (
    AnomalySection,
    Callback,
    LrSchedule,
    Metric,
    MetricSection,
    Optimizer,
    RunnerConfig,
    RunnerWrapper,
)

RunMode = Literal["train", "finetune", "eval", "predict"]


def _as_list(value: Any) -> Any:
    """One where a list may stand."""
    return value if isinstance(value, list) or value is None else [value]


class TrainerSection(Section):
    """Kept for MindFormers' files."""

    type: Literal["CausalLanguageModelingTrainer"] = key("CausalLanguageModelingTrainer", "The trainer.")
    model_name: str = key("", "Name shown in logs.")


class RunConfig(Section):
    """A run: model, data, learning, machine."""

    seed: int = key(0, "Seed of weights, shuffling, dropout and sampling.", ge=0, lt=2**32)
    output_dir: str = key("./output", "Where everything is written.", min_length=1)
    run_mode: RunMode | None = key(None, "train, finetune (the same as train), eval or predict.")
    load_checkpoint: str = key(
        "", "Weights: a file, a folder of files (merged), a folder with rank_N, an output_dir, or an HF folder."
    )
    adapter_id: str | None = key(
        None,
        "Adapter to start from: a run's output_dir, a file, a PEFT folder, or a name in adapters beside the base.",
    )
    resume_training: bool | str = key(
        False,
        "True = go on from the newest whole checkpoint of output_dir or load_checkpoint; a file name = from that one.",
    )
    src_strategy_path_or_dir: str = key("", "Layout of load_checkpoint (several ranks).")
    auto_trans_ckpt: bool = key(False, "Convert load_checkpoint to this run's layout.")
    transform_process_num: int = key(1, "Ranks that do the conversion.", ge=1)
    only_save_strategy: bool = key(False, "Write the layout files and end (several ranks).")
    use_parallel: bool = key(
        False, "Several ranks, started by scripts/msrun_launcher.sh, in the layout of parallel_config."
    )
    do_eval: bool = key(False, "Measure the loss on eval_dataset during training.")
    eval_step_interval: int = key(100, "Steps between two evaluations; 0 or less = not by steps.")
    eval_epoch_interval: int = key(-1, "Epochs between two; 0 or less = not by epochs.")
    profile: bool = key(False, "Write a timeline, the time by phase (data, compute, save ...) and by operator.")
    profile_start_step: int = key(1, "First profiled step.", ge=1)
    profile_stop_step: int = key(10, "Last profiled step.", ge=1)
    predict_data: Annotated[list[str] | None, BeforeValidator(_as_list)] = key(
        None, "Prompts, or a file with one prompt a line."
    )
    input_data: Annotated[list[str] | None, BeforeValidator(_as_list)] = key(None, "As predict_data, which wins.")
    save_file: str | None = key(
        None, "Write a predict run's answers to this file too: NAME.npy = an array of strings, and NAME.npy.json."
    )
    predict_batch_size: int | None = key(None, "Prompts answered together; null = up to 8.", ge=1)

    trainer: TrainerSection = key(TrainerSection.model_construct(), "Kept for MindFormers' files.")
    model: ModelSection = key(..., "The network.")
    processor: ProcessorSection = key(ProcessorSection.model_construct(), "How a prompt becomes ids.")
    runner_config: RunnerConfig = key(RunnerConfig.model_construct(), "How long and in what batches.")
    runner_wrapper: RunnerWrapper = key(RunnerWrapper.model_construct(), "What happens to the gradients.")
    optimizer: Optimizer | None = key(None, "The optimizer.")
    lr_schedule: LrSchedule | None = key(None, "The learning rate; null = constant.")
    train_dataset: DatasetSection | None = key(None, "Training data.")
    train_dataset_task: DatasetTask | None = key(None, "Kept for MindFormers' files; train_dataset is read.")
    eval_dataset: DatasetSection | None = key(None, "Evaluation data.")
    eval_dataset_task: DatasetTask | None = key(None, "Kept for MindFormers' files; eval_dataset is read.")
    metric: Annotated[list[Metric], BeforeValidator(_as_list)] = key(
        [MetricSection.model_construct()], "What run_mode eval measures: one, or a list."
    )
    callbacks: list[Callback] = key([], "What happens during training: log line, checkpoints, samples, TensorBoard.")
    anomaly: AnomalySection = key(AnomalySection.model_construct(), "Losses that are not numbers, or jump. (Ours.)")
    context: ContextSection = key(ContextSection.model_construct(), "The device.")
    env: Annotated[dict[str, Any], AfterValidator(check_env)] = key({}, "Environment variables (Ascend). (Ours.)")
    parallel: ParallelSection = key(ParallelSection.model_construct(), "The parallel context.")
    parallel_config: ParallelConfig = key(ParallelConfig.model_construct(), "The layout.")
    recompute_config: RecomputeConfig = key(RecomputeConfig.model_construct(), "Activations computed again.")

    @property
    def source_strategy(self) -> str:
        """The file or folder that says how the ranks that wrote load_checkpoint had shared it out; "" if none does."""
        newer = self.parallel.strategy_ckpt_config
        return (
            self.src_strategy_path_or_dir or self.parallel.strategy_ckpt_load_file or (newer and newer.load_file) or ""
        )

    def callback(self, kind: str) -> Any:
        """The first callback of this type; None if there is none."""
        return next((callback for callback in self.callbacks if callback.type == kind), None)
