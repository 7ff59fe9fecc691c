"""The sections about learning: optimizer, lr_schedule, runner_config, runner_wrapper, callbacks, anomaly, metric."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from llm_core.config.section import Section, key

Beta = Annotated[float, Field(gt=0, lt=1)]


# ---- lr_schedule ----


class WarmUpSchedule(Section):
    """What the schedules with a warm-up share."""

    learning_rate: float | None = key(None, "Highest rate; null = optimizer.learning_rate.", ge=0)
    warmup_steps: int = key(0, "Steps of the linear warm-up.", ge=0)
    warmup_epochs: float | None = key(None, "Warm-up in epochs; wins over warmup_steps.", ge=0)
    warmup_ratio: float | None = key(None, "Warm-up as a share of total_steps; wins over both.", ge=0, le=1)
    warmup_lr_init: float = key(0.0, "Rate of the first step.", ge=0)
    total_steps: int = key(-1, "Length of the schedule; -1 = epochs x steps per epoch.", ge=-1)


class ConstantSchedule(WarmUpSchedule):
    """Warm-up, then constant."""

    type: Literal["ConstantWarmUpLR", "constant_with_warmup"]


class LinearSchedule(WarmUpSchedule):
    """Warm-up, then a straight line to lr_end."""

    type: Literal["LinearWithWarmUpLR", "linear"]
    lr_end: float = key(0.0, "Rate at the end.", ge=0)


class CosineSchedule(WarmUpSchedule):
    """Warm-up, then a cosine to lr_end."""

    type: Literal["CosineWithWarmUpLR", "cosine"]
    lr_end: float = key(0.0, "Rate at the end.", ge=0)
    num_cycles: float = key(0.5, "Waves of the cosine; 0.5 falls once.", gt=0)
    decay_steps: int | None = key(None, "Step from which the rate is lr_end; null = total_steps.", ge=1)


class CosineRestartsSchedule(WarmUpSchedule):
    """Warm-up, then several cosines, each from the highest rate."""

    type: Literal["CosineWithRestartsAndWarmUpLR", "cosine_with_restarts"]
    lr_end: float = key(0.0, "Rate at the end.", ge=0)
    num_cycles: float = key(1.0, "Number of falls.", gt=0)
    decay_steps: int | None = key(None, "Step from which the rate is lr_end; null = total_steps.", ge=1)


class PolynomialSchedule(WarmUpSchedule):
    """Warm-up, then a power of the remaining share."""

    type: Literal["PolynomialWithWarmUpLR", "polynomial"]
    lr_end: float = key(1e-7, "Rate at the end.", ge=0)
    power: float = key(1.0, "Exponent.", gt=0)
    decay_steps: int | None = key(None, "Steps of the fall; null = total_steps less the warm-up.", ge=1)


class CosineAnnealingSchedule(Section):
    """A cosine without warm-up."""

    type: Literal["CosineAnnealingLR"]
    base_lr: float | None = key(None, "Highest rate; null = optimizer.learning_rate.", ge=0)
    t_max: int | None = key(None, "Steps of half a wave; null = the whole run.", ge=1)
    eta_min: float = key(0.0, "Lowest rate.", ge=0)


class CosineWarmRestartsSchedule(Section):
    """Cosines that grow longer, without warm-up."""

    type: Literal["CosineAnnealingWarmRestarts"]
    base_lr: float | None = key(None, "Highest rate; null = optimizer.learning_rate.", ge=0)
    t_0: int | None = key(None, "Steps of the first wave; null = the whole run.", ge=1)
    t_mult: int = key(1, "Each wave is this much longer than the one before.", ge=1)
    eta_min: float = key(0.0, "Lowest rate.", ge=0)


LrSchedule = Annotated[
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | CosineRestartsSchedule
    | PolynomialSchedule
    | CosineAnnealingSchedule
    | CosineWarmRestartsSchedule,
    Field(discriminator="type"),
]


# ---- optimizer ----


class OptimizerSection(Section):
    """What all optimizers share. Vectors (norms) and biases get no weight decay."""

    learning_rate: float | None = key(None, "Rate where there is no lr_schedule, or where it names none.", ge=0)
    weight_decay: float = key(0.0, "Weight decay.", ge=0)


class AdamWeightDecayOptimizer(OptimizerSection):
    """Adam with decoupled decay, fp32 state and NO bias correction: MindFormers' optimizer for Llama 2."""

    type: Literal["FP32StateAdamWeightDecay", "fp32_adamw", "AdamWeightDecay", "FusedAdamWeightDecay", "fused_adamw"]
    beta1: Beta = key(0.9, "Decay of the mean gradient.")
    beta2: Beta = key(0.999, "Decay of the mean square.")
    eps: float = key(1e-6, "Added to the root of the mean square.", gt=0)


class AdamWOptimizer(OptimizerSection):
    """Adam with decoupled decay and bias correction."""

    type: Literal["AdamW", "adamw"]
    betas: tuple[Beta, Beta] = key((0.9, 0.999), "Decays of the mean gradient and of the mean square.")
    eps: float = key(1e-8, "Added to the root of the mean square.", gt=0)


class AdamOptimizer(OptimizerSection):
    """Adam; the decay joins the gradient (L2)."""

    type: Literal["Adam", "adam"]
    beta1: Beta = key(0.9, "Decay of the mean gradient.")
    beta2: Beta = key(0.999, "Decay of the mean square.")
    eps: float = key(1e-8, "Added to the root of the mean square.", gt=0)


class SgdOptimizer(OptimizerSection):
    """Stochastic gradient descent."""

    type: Literal["SGD", "sgd"]
    momentum: float = key(0.0, "Momentum.", ge=0, lt=1)
    nesterov: bool = key(False, "Nesterov's momentum.")


class AdagradOptimizer(OptimizerSection):
    """Adagrad."""

    type: Literal["Adagrad", "adagrad"]
    accum: float = key(0.1, "First value of the accumulated squares.", ge=0)
    eps: float = key(0.0, "Added to the root.", ge=0)


class AdafactorOptimizer(OptimizerSection):
    """Adafactor: factored second moments."""

    type: Literal["Adafactor", "AdaFactor", "adafactor"]


Optimizer = Annotated[
    AdamWeightDecayOptimizer | AdamWOptimizer | AdamOptimizer | SgdOptimizer | AdagradOptimizer | AdafactorOptimizer,
    Field(discriminator="type"),
]


# ---- runner_config, runner_wrapper ----


class RunnerConfig(Section):
    """How long and in what batches."""

    epochs: int = key(1, "Passes over the training data.", ge=1)
    batch_size: int = key(1, "Records a step (of each accumulated part); evaluation uses it as well.", ge=1)
    gradient_accumulation_steps: int = key(1, "Batches whose gradients make one update.", ge=1)
    sink_mode: bool = key(True, "Report every sink_size steps instead of every step; changes no number.")
    sink_size: int = key(1, "Steps between two reports under sink_mode; -1 = the whole epoch.", ge=-1)
    stop_step: int = key(0, "Stop after this many steps; 0 = do not.", ge=0)

    @model_validator(mode="after")
    def _sink_size_is_not_zero(self) -> "RunnerConfig":
        if self.sink_size == 0:
            raise ValueError("sink_size is the number of steps between two reports, or -1; it cannot be 0")
        return self


class FixedLossScale(Section):
    """A loss scale that never changes."""

    type: Literal["FixedLossScaleUpdateCell"]
    loss_scale_value: float = key(65536, "The scale.", gt=0)


class DynamicLossScale(Section):
    """Divided at an overflow, multiplied after a while without one."""

    type: Literal["DynamicLossScaleUpdateCell"]
    loss_scale_value: float = key(65536, "First scale.", ge=1)
    scale_factor: float = key(2, "Divisor and multiplier.", gt=1)
    scale_window: int = key(1000, "Clean steps before it grows.", ge=1)


class AdaptiveLossScale(DynamicLossScale):
    """As the dynamic one, with a window that adapts."""

    type: Literal["AdaptiveLossScaleUpdateCell"]
    scale_window: int = key(20, "First window.", ge=1)
    min_scale_window: int = key(20, "Shortest window.", ge=1)
    max_scale_window: int = key(1000, "Longest window.", ge=1)


def _scale_kind(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("type"))
    return getattr(value, "type", "number")


ScaleSense = Annotated[
    Annotated[float, Field(gt=0), Tag("number")]
    | Annotated[FixedLossScale, Tag("FixedLossScaleUpdateCell")]
    | Annotated[DynamicLossScale, Tag("DynamicLossScaleUpdateCell")]
    | Annotated[AdaptiveLossScale, Tag("AdaptiveLossScaleUpdateCell")],
    Discriminator(_scale_kind),
]


class RunnerWrapper(Section):
    """What happens to the gradients of a step."""

    type: Literal["MFTrainOneStepCell", "MFPipelineWithLossScaleCell"] = key(
        "MFTrainOneStepCell", "Kept for MindFormers' files; the layout decides."
    )
    use_clip_grad: bool = key(False, "Clip by the global norm.")
    max_grad_norm: float = key(1.0, "Largest global norm.", gt=0)
    scale_sense: ScaleSense = key(1.0, "Loss scale: a number, or a section with a type.")


# ---- callbacks, metric, anomaly ----


class LossMonitor(Section):
    """The log line."""

    type: Literal["MFLossMonitor"]
    per_print_times: int = key(1, "Steps between two lines.", ge=1)


class CheckpointMonitor(Section):
    """Checkpoints."""

    type: Literal["CheckpointMonitor"]
    prefix: str = key("CKP", "First part of the file names.", pattern=r"^[^/\\]+$")
    directory: str | None = key(None, "Where to; null = output_dir.")
    save_checkpoint_steps: int = key(1, "Steps between two checkpoints; 0 = only at the end.", ge=0)
    save_checkpoint_seconds: int = key(0, "Seconds between two; above 0 it takes the place of the steps.", ge=0)
    keep_checkpoint_max: int = key(5, "How many to keep.", ge=1)
    keep_checkpoint_per_n_minutes: int = key(0, "Keep one of every so many minutes besides; 0 = do not.", ge=0)
    save_network_params: bool = key(False, "Write the weights alone into checkpoint_network/ as well.")
    save_trainable_params: bool = key(False, "Write the trainable weights alone into checkpoint_trainable/ as well.")
    checkpoint_format: Literal["safetensors", "ckpt"] = key("safetensors", "File format.")
    keep_best: Literal["eval_loss"] | None = key(None, "Keep the checkpoint with the lowest of this. (Ours.)")


class SummaryMonitor(Section):
    """TensorBoard."""

    type: Literal["SummaryMonitor"]
    summary_dir: str | None = key(None, "Folder of the event files; null = output_dir/summary.")
    per_steps: int = key(1, "Steps between two points.", ge=1)


class SampleMonitor(Section):
    """Answers shown while training. (Ours.)"""

    type: Literal["SampleMonitor"]
    prompts: list[str] = key(..., "Prompts to answer.", min_length=1)
    sample_steps: int = key(100, "Steps between two samples.", ge=1)
    max_new_tokens: int = key(32, "Longest answer.", ge=1)


Callback = Annotated[LossMonitor | CheckpointMonitor | SummaryMonitor | SampleMonitor, Field(discriminator="type")]


class MetricSection(Section):
    """What run_mode eval measures on eval_dataset."""

    type: Literal["PerplexityMetric", "EmF1Metric", "ClassificationMetric"] = key("PerplexityMetric", "The metric.")


class ChoiceMetricSection(Section):
    """MMLU or CMMLU: questions of four choices in CSV files. (Ours.)"""

    type: Literal["ChoiceMetric"]
    path: str = key("", "The benchmark's folder, which holds dev/ and test/ (or val/), or a folder of .csv files.")
    split: str = key("test", "Which of its folders is asked.", min_length=1)
    shots: int = key(0, "Examples of dev/ before each question.", ge=0)
    method: Literal["likelihood", "generation"] = key(
        "likelihood", "The likeliest letter, or the first one that the model writes."
    )
    num_samples: int | None = key(None, "Ask the first so many questions of each subject; null = all.", ge=1)


Metric = Annotated[MetricSection | ChoiceMetricSection, Field(discriminator="type")]


Action = Literal["stop", "skip", "rollback"]


class AnomalySection(Section):
    """What to do about a loss that is not a number, or that jumps. (Ours.)"""

    nan: Action = key("stop", "At a loss that is not finite.")
    spike_factor: float = key(0.0, "A loss above this many times the recent mean is a spike; 0 = do not look.", ge=0)
    spike_window: int = key(50, "Steps of the recent mean.", ge=2)
    spike: Action = key("skip", "At a spike.")
    max_events: int = key(10, "Stop at more events than this.", ge=0)
