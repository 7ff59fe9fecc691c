"""YAML in the form in which MindFormers ships it: anchors, upload callbacks, keys for other models."""

PRETRAIN_7B = """\
seed: 0
output_dir: './output'
load_checkpoint: ''
src_strategy_path_or_dir: ''
auto_trans_ckpt: False
only_save_strategy: False
resume_training: False
run_mode: 'train'

trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'llama2_7b'

runner_config:
  epochs: 2
  batch_size: 1
  sink_mode: True
  sink_size: 2
  gradient_accumulation_steps: 8

optimizer:
  type: FP32StateAdamWeightDecay
  beta1: 0.9
  beta2: 0.95
  eps: 1.e-8
  learning_rate: 5.e-5

lr_schedule:
  type: CosineWithWarmUpLR
  learning_rate: 5.e-5
  lr_end: 0
  warmup_ratio: 0.03
  total_steps: -1

train_dataset: &train_dataset
  data_loader:
    type: MindDataset
    dataset_dir: ""
    shuffle: True
  input_columns: ["input_ids"]
  num_parallel_workers: 8
  python_multiprocessing: False
  drop_remainder: True
  batch_size: 6
  repeat: 1
  numa_enable: False
  prefetch_size: 1
train_dataset_task:
  type: CausalLanguageModelDataset
  dataset_config: *train_dataset

eval_dataset: &eval_dataset
  data_loader:
    type: MindDataset
    dataset_dir: ""
    shuffle: False
  input_columns: ["input_ids"]
  num_parallel_workers: 8
  python_multiprocessing: False
  drop_remainder: False
  repeat: 1
  numa_enable: False
  prefetch_size: 1
eval_dataset_task:
  type: CausalLanguageModelDataset
  dataset_config: *eval_dataset

use_parallel: True
parallel:
  parallel_mode: 1
  gradients_mean: False
  enable_alltoall: False
  full_batch: True
  search_mode: "sharding_propagation"
  enable_parallel_optimizer: True
  strategy_ckpt_save_file: "./ckpt_strategy.ckpt"
  parallel_optimizer_config:
    gradient_accumulation_shard: False
    parallel_optimizer_threshold: 64
parallel_config:
  data_parallel: 8
  model_parallel: 1
  pipeline_stage: 1
  use_seq_parallel: False
  micro_batch_num: 1
  vocab_emb_dp: True
  gradient_aggregation_group: 4
micro_batch_interleave_num: 1

recompute_config:
  recompute: False
  select_recompute: False
  parallel_optimizer_comm_recompute: False
  mp_comm_recompute: True
  recompute_slice_activation: True

callbacks:
  - type: MFLossMonitor
  - type: CheckpointMonitor
    prefix: "llama2_7b"
    save_checkpoint_steps: 100
    integrated_save: False
    async_save: False
  - type: ObsMonitor

context:
  mode: 0
  device_target: "Ascend"
  enable_graph_kernel: False
  max_call_depth: 10000
  max_device_memory: "58GB"
  save_graphs: False
  save_graphs_path: "./graph"
  device_id: 0

model:
  model_config:
    type: LlamaConfig
    batch_size: 1
    seq_length: 4096
    hidden_size: 4096
    num_layers: 32
    num_heads: 32
    vocab_size: 32000
    multiple_of: 256
    rms_norm_eps: 1.0e-5
    bos_token_id: 1
    eos_token_id: 2
    pad_token_id: 0
    ignore_token_id: -100
    compute_dtype: "float16"
    layernorm_compute_type: "float32"
    softmax_compute_type: "float16"
    rotary_dtype: "float16"
    param_init_type: "float16"
    use_past: False
    extend_method: "None"
    scaling_factor: 1.0
    use_flash_attention: True
    offset: 0
    checkpoint_name_or_path: "llama2_7b"
    repetition_penalty: 1
    max_decode_length: 512
    top_k: 3
    top_p: 1
    do_sample: False
  arch:
    type: LlamaForCausalLM
processor:
  return_tensors: ms
  tokenizer:
    unk_token: '<unk>'
    bos_token: '<s>'
    eos_token: '</s>'
    pad_token: '<unk>'
    type: LlamaTokenizer
  type: LlamaProcessor

metric:
  type: PerplexityMetric

runner_wrapper:
  type: MFTrainOneStepCell
  scale_sense:
    type: DynamicLossScaleUpdateCell
    loss_scale_value: 65536
    scale_factor: 2
    scale_window: 1000
  use_clip_grad: True

eval_callbacks:
  - type: ObsMonitor

auto_tune: False
filepath_prefix: './autotune'
autotune_per_step: 10

profile: False
profile_start_step: 1
profile_stop_step: 10
init_start_profile: False
profile_communication: False
profile_memory: True
layer_scale: False
layer_decay: 0.65
lr_scale_factor: 256

remote_save_url: "Please input obs url on AICC platform."
"""


def changed(text: str, *changes: tuple[str, str]) -> str:
    """The text with replacements that must all apply."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


LORA_7B = changed(
    PRETRAIN_7B,
    ("run_mode: 'train'", "run_mode: 'finetune'"),
    ("model_name: 'llama2_7b'", "model_name: 'llama2_7b_lora'"),
    ("  gradient_accumulation_steps: 8\n", ""),
    ("micro_batch_num: 1\n", "micro_batch_num: 64\n"),
    ('  strategy_ckpt_save_file: "./ckpt_strategy.ckpt"\n',
     '  strategy_ckpt_config:\n    save_file: "./ckpt_strategy.ckpt"\n    only_trainable_params: False\n'),
    ("    do_sample: False\n", """\
    do_sample: False
    pet_config:
      pet_type: lora
      lora_rank: 16
      lora_alpha: 16
      lora_dropout: 0.05
      target_modules: '.*wq|.*wk|.*wv|.*wo'
"""),
    ("""\
  scale_sense:
    type: DynamicLossScaleUpdateCell
    loss_scale_value: 65536
    scale_factor: 2
    scale_window: 1000
""", "  scale_sense: 1.0\n"),
)  # fmt: skip

PREFIX_7B = changed(
    LORA_7B,
    ("""\
      pet_type: lora
      lora_rank: 16
      lora_alpha: 16
      lora_dropout: 0.05
      target_modules: '.*wq|.*wk|.*wv|.*wo'
""", """\
      pet_type: prefixtuning
      prefix_token_num: 16
      mid_dim: 512
      dropout_rate: 0.01
"""),
)  # fmt: skip

PRETRAIN_70B = changed(
    PRETRAIN_7B,
    ("recompute: False\n  select_recompute: False", "recompute: [3, 5, 5, 5, 5, 5, 5, 2]\n  select_recompute: False"),
    ("  device_id: 0\n", """\
  device_id: 0
  jit_config:
    jit_level: "O1"
  memory_optimize_level: "O0"
  ascend_config:
    precision_mode: "must_keep_origin_dtype"
    parallel_speed_up_json_path: "/path/to/your/parallel_speed_up.json"
"""),
    ("    num_heads: 32\n", "    num_heads: 32\n    n_kv_heads: 8\n    ffn_dim_multiplier: 1.3\n"),
    ("    do_sample: False\n", "    do_sample: False\n    qkv_concat: False\n    fine_grain_interleave: 2\n"),
    ("use_parallel: True\n", """\
use_parallel: True
eval_step_interval: -1
eval_epoch_interval: 50
moe_config:
  expert_num: 1
  capacity_factor: 1.05
  aux_loss_factor: 0.05
  num_experts_chosen: 1
"""),
)  # fmt: skip

INTERNLM_LORA = changed(
    LORA_7B,
    ("type: LlamaConfig", "type: InternLMConfig"),
    ("type: LlamaForCausalLM", "type: InternLMForCausalLM"),
    ("type: LlamaTokenizer", "type: InternLMTokenizer\n    vocab_file: './internlm-chat/tokenizer.model'"),
    ("    use_past: False\n", """\
    use_past: False
    has_bias: True
    auto_map:
      AutoModel: internlm.InternLMForCausalLM
      AutoConfig: internlm_config.InternLMConfig
      AutoTokenizer: [internlm_tokenizer.InternLMTokenizer, null]
"""),
    ("    async_save: False\n", "    async_save: False\n    keep_checkpoint_max: 3\n"),
    ("  device_id: 0\n", '  device_id: 0\n  jit_config:\n    jit_level: "O2"\n'),
)  # fmt: skip

PREDICT_7B = changed(
    PRETRAIN_7B,
    ("run_mode: 'train'", "run_mode: 'predict'"),
    ("use_parallel: True", "use_parallel: False"),
    ("type: PerplexityMetric", "type: EmF1Metric"),
    ("    use_past: False\n", "    use_past: True\n    is_dynamic: True\n    block_size: 16\n    num_blocks: 1024\n"),
)
