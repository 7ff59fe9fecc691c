"""The sections about machine and layout: context, env, parallel, parallel_config, recompute_config."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llm_core.config.section import Section, key

MemorySize = Annotated[str, Field(pattern=r"^\d+(\.\d+)?GB$")]


def _on_off(value: Any) -> Any:
    """YAML 1.1 reads a bare ON as true."""
    return {True: "ON", False: "OFF"}.get(value, value) if isinstance(value, bool) else value


def _lower_on_off(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class JitConfig(Section):
    """Compiler options."""

    jit_level: Literal["O0", "O1", "O2"] = key("O0", "Level of the graph compiler (Ascend).")


class AscendConfig(Section):
    """Options of the Ascend backend."""

    precision_mode: (
        Literal[
            "must_keep_origin_dtype",
            "force_fp16",
            "allow_fp32_to_fp16",
            "allow_mix_precision",
            "allow_mix_precision_fp16",
            "allow_mix_precision_bf16",
        ]
        | None
    ) = key(None, "What the backend may do to the types.")
    parallel_speed_up_json_path: str | None = key(None, "A parallel_speed_up.json; its keys are checked.")


class ContextSection(Section):
    """MindSpore's context. What only Ascend has is checked everywhere and applied there."""

    mode: Literal[0, 1] = key(0, "0 = graph; 1 = pynative, which is mapped to 0.")
    device_target: Literal["Ascend", "GPU", "CPU"] = key("Ascend", "Device; mapped to what the machine has.")
    device_id: int = key(0, "Number of the device.", ge=0)
    max_call_depth: int = key(10000, "Deepest nesting of calls in a graph.", ge=1)
    runtime_num_threads: int | None = key(None, "Threads; null = one a core.", ge=1)
    deterministic: Annotated[Literal["ON", "OFF"], BeforeValidator(_on_off)] = key(
        "OFF", "Deterministic kernels (Ascend)."
    )
    save_graphs: bool | Literal[0, 1, 2, 3] = key(False, "Save the compiler's intermediate graphs.")
    save_graphs_path: str = key("./graph", "Where to.")
    enable_graph_kernel: bool = key(False, "Graph kernel fusion (Ascend).")
    max_device_memory: MemorySize | None = key(None, 'Memory limit, such as "58GB" (Ascend).')
    mempool_block_size: MemorySize | None = key(None, 'Block size of the memory pool, such as "1GB" (Ascend).')
    memory_optimize_level: Literal["O0", "O1"] | None = key(None, "Memory optimization (Ascend).")
    jit_config: JitConfig | None = key(None, "Compiler options.")
    ascend_config: AscendConfig | None = key(None, "Ascend options.")
    infer_boost: Annotated[Literal["on", "off"], BeforeValidator(_lower_on_off)] | None = key(
        None, "Faster inference kernels (Ascend)."
    )


ASCEND_ONLY = (
    "deterministic", "enable_graph_kernel", "max_device_memory", "mempool_block_size",
    "memory_optimize_level", "jit_config", "ascend_config", "infer_boost", "runtime_num_threads", "save_graphs",
)  # fmt: skip

# With explicit collectives there is nothing for these to choose.
LAYOUT_KEYS_UNUSED = {
    "parallel": ("parallel_mode", "gradients_mean", "enable_alltoall", "full_batch", "search_mode", "auto_pipeline",
                 "dataset_strategy"),
    "parallel_config": ("gradient_aggregation_group", "context_parallel_algo", "ulysses_degree_in_cp", "mem_coeff",
                        "seq_split_num"),
}  # fmt: skip

# An environment variable can make a process load any library, so a run file may set these and no other.
ENV_NAMES = frozenset(
    """HCCL_BUFFSIZE HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT HCCL_DETERMINISTIC HCCL_OP_EXPANSION_MODE HCCL_ALGO
    HCCL_IF_BASE_PORT HCCL_IF_IP HCCL_SOCKET_IFNAME HCCL_SOCKET_FAMILY HCCL_WHITELIST_DISABLE HCCL_RDMA_TC HCCL_RDMA_SL
    HCCL_INTRA_PCIE_ENABLE HCCL_INTRA_ROCE_ENABLE LCCL_DETERMINISTIC
    MS_DEV_SIDE_EFFECT_LOAD_ELIM MS_DEV_RUNTIME_CONF MS_DEV_HCCL_CONF MS_DEV_GRAPH_KERNEL_FLAGS MS_ALLOC_CONF
    MS_ALLOC_FEATURE MS_MEMORY_STATISTIC MS_ENABLE_LCCL MS_ENABLE_INTERNAL_BOOST MS_ENABLE_FORMAT_MODE MS_ENABLE_GE
    MS_ENABLE_REF_MODE MS_GE_TRAIN MS_GE_ATOMIC_CLEAN_POLICY MS_FORMAT_MODE MS_ENABLE_TFT MS_ENABLE_FA_FLATTEN
    MS_ENABLE_NUMA MS_SUBMODULE_LOG_v MS_NODE_TIMEOUT MS_TOPO_TIMEOUT MS_RETRY_INTERVAL_LOWER MS_RETRY_INTERVAL_UPPER
    ENABLE_CELL_REUSE ENABLE_LAZY_INLINE ENABLE_LAZY_INLINE_NO_PIPELINE CUSTOM_MATMUL_SHUFFLE GLOG_v
    ASCEND_GLOBAL_LOG_LEVEL ASCEND_GLOBAL_EVENT_ENABLE ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_LAUNCH_BLOCKING
    ACL_STREAM_TIMEOUT ACL_DEVICE_SYNC_TIMEOUT ACLNN_CACHE_LIMIT TASK_QUEUE_ENABLE CPU_AFFINITY GRAPH_OP_RUN
    OPENBLAS_NUM_THREADS OMP_NUM_THREADS""".split()
)


def _deepspeed_stage(value: Any) -> Any:
    """XTuner's and DeepSpeed's names of the stages: deepspeed_zero2 is 2."""
    name = str(value)
    return int(name[-1]) if re.fullmatch(r"deepspeed_zero[123]", name) else value


class ParallelOptimizerConfig(Section):
    """Options of the sharded optimizer."""

    gradient_accumulation_shard: bool = key(False, "Shard the accumulated gradients as well.")
    parallel_optimizer_threshold: int = key(64, "Parameters below this size (KB) stay whole.", ge=0)
    optimizer_weight_shard_size: int = key(-1, "Ranks that share one copy; -1 = all of data_parallel.", ge=-1)


class StrategyCkptConfig(Section):
    """Files that tell the layout."""

    save_file: str = key("./ckpt_strategy.ckpt", "Written to output_dir/strategy.")
    load_file: str | None = key(None, "Layout of load_checkpoint.")
    only_trainable_params: bool = key(True, "Trainable parameters only.")


class ParallelSection(Section):
    """MindSpore's parallel context; used with use_parallel True."""

    parallel_mode: Literal[
        0, 1, 2, 3, "stand_alone", "data_parallel", "semi_auto_parallel", "auto_parallel", "hybrid_parallel"
    ] = key(1, "0 data, 1 semi-auto, 2 auto, 3 hybrid.")
    gradients_mean: bool = key(
        False, "Average instead of summing. (The loss is a mean over the global batch in any case.)"
    )
    enable_alltoall: bool = key(False, "All-to-all for experts.")
    full_batch: bool = key(True, "Every rank reads the whole batch.")
    search_mode: Literal["sharding_propagation", "dynamic_programming", "recursive_programming"] = key(
        "sharding_propagation", "Search of auto parallel."
    )
    enable_parallel_optimizer: bool = key(False, "Shard the optimizer over data_parallel.")
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_deepspeed_stage)] = key(
        0, "What data_parallel ranks share out: 1 the optimizer's state, 2 gradients too, 3 parameters too. (Ours.)"
    )
    strategy_ckpt_save_file: str = key("./ckpt_strategy.ckpt", "Written to output_dir/strategy.")
    strategy_ckpt_load_file: str | None = key(None, "Layout of load_checkpoint.")
    strategy_ckpt_config: StrategyCkptConfig | None = key(None, "Newer form of both.")
    parallel_optimizer_config: ParallelOptimizerConfig | None = key(None, "Options of the sharded optimizer.")
    auto_pipeline: bool = key(False, "Let the compiler place pipeline stages.")
    dataset_strategy: str | list[Any] | None = key(None, "Layout of the input.")

    @property
    def zero(self) -> int:
        """The stage that all of the keys come to: of the optimizer alone 1, with gradient_accumulation_shard 2."""
        if not self.enable_parallel_optimizer:
            return self.zero_stage
        options = self.parallel_optimizer_config
        return max(self.zero_stage, 2 if options is not None and options.gradient_accumulation_shard else 1)


class ParallelConfig(Section):
    """The layout: data x model x context x pipeline = number of ranks; used with use_parallel True."""

    data_parallel: int = key(1, "Copies of the model.", ge=1)
    model_parallel: int = key(1, "Ranks that share every layer.", ge=1)
    context_parallel: int = key(1, "Ranks that share a sequence.", ge=1)
    expert_parallel: int = key(1, "Ranks that share the experts.", ge=1)
    pipeline_stage: int = key(1, "Groups of layers on different ranks.", ge=1)
    micro_batch_num: int = key(1, "Parts of a batch in the pipeline; at least pipeline_stage.", ge=1)
    use_seq_parallel: bool = key(False, "Shard the norms along the sequence.")
    vocab_emb_dp: bool = key(True, "Keep the embedding whole on every rank.")
    gradient_aggregation_group: int = key(4, "Gradients reduced together.", ge=1)
    optimizer_shard: bool | None = key(None, "Old name of parallel.enable_parallel_optimizer.")
    context_parallel_algo: Literal["colossalai_cp", "ulysses_cp", "hybird_cp", "hybrid_cp"] = key(
        "colossalai_cp", "How a sequence is shared."
    )
    ulysses_degree_in_cp: int = key(1, "Ulysses' part of context_parallel.", ge=1)
    mem_coeff: float = key(0.1, "Memory weight of auto parallel.", ge=0)
    seq_split_num: int = key(1, "Parts of a sequence in the pipeline.", ge=1)


class RecomputeConfig(Section):
    """Trade time for memory: activations computed again in the backward pass."""

    recompute: bool | list[int] = key(False, "Whole layers: all, none, or how many of each pipeline stage.")
    select_recompute: bool | list[int] | list[str] = key(False, "The cheap parts of a layer only.")


def check_env(value: Any) -> dict[str, str]:
    """The `env` section: known names, plain values; as text. Raises ValueError."""
    import difflib

    if not isinstance(value, dict):
        raise ValueError("is a mapping of environment variables")
    for name, content in value.items():
        if name not in ENV_NAMES:
            near = difflib.get_close_matches(name, ENV_NAMES, 1)
            hint = f"; did you mean {near[0]}?" if near else "; set it in the shell if you must"
            raise ValueError(f"{name} is no variable that a run file may set{hint}")
        if not isinstance(content, str | int | float) or not re.fullmatch(r"[\w.,:;+/= -]*", str(content)):
            raise ValueError(f"{name}: {content!r} is no plain value")
    return {name: str(int(content) if isinstance(content, bool) else content) for name, content in value.items()}
