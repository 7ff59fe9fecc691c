"""The `model` and `processor` sections: what is trained, how it generates, how text becomes ids."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_core.config.section import Section, key

Dtype = Literal["float32", "float16", "bfloat16"]
LoraInit = Literal["he_uniform", "normal", "zero", "zeros"]
_ZEROS = ("zero", "zeros")


class LoraConfig(Section):
    """LoRA: low-rank updates beside frozen weights."""

    pet_type: Literal["lora"]
    lora_rank: int = key(8, "Rank of the update.", ge=1)
    lora_alpha: float = key(16, "The update is scaled by lora_alpha / lora_rank.", gt=0)
    lora_dropout: float = key(0.01, "Dropout on the update's input.", ge=0, lt=1)
    lora_a_init: LoraInit = key(
        "he_uniform", "Initial values of A: he_uniform (within 1 / sqrt(in)), normal (deviation 0.01) or zero."
    )
    lora_b_init: LoraInit = key("zero", "Initial values of B, likewise; zero = the model begins as its base.")
    target_modules: str = key(".*wq|.*wk|.*wv|.*wo", "Regular expression on the leaf name of a linear layer.")
    exclude_layers: str | None = key(None, "Regular expression on the whole names of layers to leave alone.")
    freeze_include: list[str] = key([], "Name patterns (*, ?) to freeze besides the base weights.")
    freeze_exclude: list[str] = key([], "Name patterns (*, ?) to train all the same, of the base as well.")
    param_init_type: Dtype | None = key(None, "Type of the factors; they are float32 in any case.")
    compute_dtype: Dtype | None = key(None, "Type of the update's products; null = as the layer.")
    use_rslora: bool = key(False, "Scale by lora_alpha / sqrt(lora_rank) instead. (Ours.)")
    use_dora: bool = key(False, "DoRA: the rows' lengths are trained apart from their directions. (Ours.)")

    @model_validator(mode="after")
    def _something_can_be_learnt(self) -> "LoraConfig":
        if self.lora_a_init in _ZEROS and self.lora_b_init in _ZEROS:
            raise ValueError("lora_a_init and lora_b_init are both zero: then neither gets a gradient, ever")
        return self


class PrefixTuningConfig(Section):
    """Prefix tuning: trained keys and values before every layer's own."""

    pet_type: Literal["prefixtuning"]
    prefix_token_num: int = key(128, "Number of trained positions.", ge=1)
    mid_dim: int = key(512, "Width of the MLP that makes keys and values of them.", ge=1)
    dropout_rate: float = key(0.1, "Dropout on these keys and values.", ge=0, lt=1)


class PTuning2Config(Section):
    """P-tuning v2: the same, by default without an MLP."""

    pet_type: Literal["ptuning2"]
    pre_seq_len: int = key(128, "Number of trained positions.", ge=1)
    prefix_projection: bool = key(False, "Make keys and values by an MLP, as prefix tuning does.")
    projection_dim: int = key(128, "Width of that MLP.", ge=1)
    dropout_prob: float = key(0.01, "Dropout on these keys and values.", ge=0, lt=1)


PetConfig = Annotated[LoraConfig | PrefixTuningConfig | PTuning2Config, Field(discriminator="pet_type")]


class DecoderConfig(Section):
    """What the configs of all families share: sizes, types, special ids, generation."""

    seq_length: int = key(2048, "Tokens a training record feeds; the longest context in prediction.", ge=1)
    hidden_size: int = key(4096, "Width of the residual stream.", ge=1)
    num_layers: int = key(32, "Number of decoder layers.", ge=1)
    num_heads: int = key(32, "Number of query heads.", ge=1)
    head_dim: int | None = key(None, "Width of a head; null = hidden_size / num_heads. (Ours.)", ge=1)
    vocab_size: int = key(32000, "Rows of the embedding table.", ge=1)
    max_position_embedding: int | None = key(
        None, "Longest context the base model was trained with; null = seq_length. RoPE scaling starts from it.", ge=1
    )
    initializer_range: float = key(0.02, "Standard deviation of the initial weights. (Ours.)", gt=0)
    offset: int | list[int] | None = key(
        0, "Layers that each pipeline stage has beyond an even share: a list whose sum is 0."
    )
    pp_interleave_num: int = key(1, "Pieces of the model that each pipeline stage has.", ge=1)
    hidden_dropout_rate: float = key(0.0, "Dropout on the outputs of attention and feed-forward. (Ours.)", ge=0, lt=1)
    attention_dropout_rate: float = key(0.0, "Dropout on attention probabilities. (Ours.)", ge=0, lt=1)
    theta: float = key(10000.0, "Base of the rotary embedding.", gt=0)
    extend_method: Literal["None", "PI", "NTK", "DYNAMIC_NTK", "YARN", "LLAMA3"] = key(
        "None", "Scaling of the rotary embedding. (DYNAMIC_NTK is ours.)"
    )
    scaling_factor: float | dict[str, float | int | bool | None] = key(
        1.0, "Factor of extend_method, or a mapping with its parameters (factor, original_max_position_embeddings ...)."
    )
    bos_token_id: int = key(1, "Id of the text's beginning.", ge=0)
    eos_token_id: int | list[int] = key(2, "Id, or ids, that end a text.")
    pad_token_id: int = key(0, "Id that carries no loss; -1 = nothing is padding.", ge=-1)
    ignore_token_id: int = key(-100, "Label that carries no loss.")
    compute_dtype: Dtype = key("float16", "Type of the matrix products.")
    layernorm_compute_type: Dtype = key("float32", "Type of the norms.")
    softmax_compute_type: Dtype = key("float32", "Type of the softmax.")
    rotary_dtype: Dtype = key("float32", "Type of the rotary tables.")
    param_init_type: Dtype = key("float16", "Type of the parameters.")
    embedding_init_type: Dtype | None = key(None, "Type of the embedding table; null = param_init_type.")
    tie_word_embeddings: bool = key(False, "The head is the embedding table.")
    use_flash_attention: bool = key(False, "Attention without the full score matrix.")
    num_labels: int = key(2, "Classes of a classifier (arch.type ...ForSequenceClassification). (Ours.)", ge=2)
    pet_config: PetConfig | None = key(None, "Parameter-efficient tuning: lora, prefixtuning or ptuning2.")

    do_sample: bool = key(True, "Sample; False = the likeliest token.")
    top_k: int = key(5, "Sample among the k likeliest tokens; 0 = all.", ge=0)
    top_p: float = key(1.0, "Sample among the likeliest tokens of this total probability.", gt=0, le=1)
    temperature: float = key(1.0, "Divides the logits before sampling.", ge=0)
    repetition_penalty: float = key(1.0, "Above 1 makes seen tokens less likely.", gt=0)
    max_decode_length: int = key(
        1024, "Longest text, prompt included, when neither max_length nor max_new_tokens is given.", ge=1
    )
    max_length: int | None = key(None, "Longest text, prompt included.", ge=1)
    max_new_tokens: int | None = key(None, "Longest answer; wins over max_length.", ge=1)
    min_length: int = key(0, "Shortest text, prompt included.", ge=0)
    min_new_tokens: int | None = key(None, "Shortest answer; wins over min_length.", ge=0)
    num_return_sequences: int = key(1, "Answers to each prompt. (Ours.)", ge=1)
    num_beams: int = key(1, "Texts written side by side; above 1 = beam search, or beam sample with do_sample.", ge=1)
    num_beam_groups: int = key(1, "Groups of beams that are kept from the same tokens (diverse beam search).", ge=1)
    diversity_penalty: float = key(0.0, "How strongly groups are kept apart.", ge=0)
    length_penalty: float = key(1.0, "A beam's score is its log probability / length ** length_penalty.")
    early_stopping: bool | Literal["never"] = key(
        False, "True: stop when num_beams answers are there; never: when none can become better; False: in between."
    )
    penalty_alpha: float | None = key(None, "Above 0: contrastive search among top_k candidates.", ge=0, le=1)
    no_repeat_ngram_size: int = key(0, "No run of so many tokens stands in a text twice; 0 = off.", ge=0)
    bad_words_ids: list[list[int]] = key([], "Words that are not written, each a list of token ids.")
    force_words: list[str | list[str]] = key(
        [], "Words that an answer must hold, or lists of which it must hold one; needs num_beams. (Ours.)"
    )
    force_words_ids: list[list[int] | list[list[int]]] = key([], "The same as token ids.")
    assistant: str | None = key(
        None, "A small model that guesses tokens ahead: its run file, or a Hugging Face folder. (Ours.)"
    )
    num_assistant_tokens: int = key(5, "Tokens that it guesses at a time.", ge=1)
    stop_strings: list[str] = key([], "Texts that end an answer. (Ours.)")

    @model_validator(mode="after")
    def _prefix_fits(self) -> "DecoderConfig":
        pet, context = self.pet_config, max(self.max_position_embedding or 0, self.seq_length)
        for name in ("prefix_token_num", "pre_seq_len"):
            if (length := getattr(pet, name, 0)) > context:
                raise ValueError(
                    f"pet_config.{name} {length} is longer than the context that it stands before: "
                    f"seq_length (or max_position_embedding) is {context}; take fewer positions"
                )
        return self


class LlamaConfig(DecoderConfig):
    """Llama and Llama 2: RMSNorm, SwiGLU, rotary positions, multi-head or grouped-query attention."""

    type: Literal["LlamaConfig"] = key(..., "The family.")
    n_kv_heads: int | None = key(None, "Number of key and value heads; null = num_heads.", ge=1)
    intermediate_size: int | None = key(
        None,
        "Width of the feed-forward; null = 8/3 hidden_size, times ffn_dim_multiplier, rounded up to multiple_of.",
        ge=1,
    )
    multiple_of: int = key(256, "Rounds the feed-forward's width up.", ge=1)
    ffn_dim_multiplier: float | None = key(None, "Widens the feed-forward (1.3 for Llama 2 70B).", gt=0)
    rms_norm_eps: float = key(1e-5, "Added to the mean square.", gt=0)
    qkv_has_bias: bool = key(False, "Biases on the query, key and value projections.")
    has_bias: bool = key(False, "Biases on all four projections of the attention (HF's attention_bias).")
    qkv_concat: bool = key(False, "One matrix for query, key and value, and one for gate and up.")

    @model_validator(mode="after")
    def _heads_divide(self) -> "LlamaConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}; change one of them, "
                "or give head_dim"
            )
        width = self.head_dim or self.hidden_size // self.num_heads
        if width % 2:
            raise ValueError(f"head_dim (hidden_size / num_heads) is {width}, but rotary positions need an even width")
        if self.n_kv_heads and self.num_heads % self.n_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        return self


class InternLMConfig(LlamaConfig):
    """InternLM: Llama with biases in the attention."""

    type: Literal["InternLMConfig"] = key(..., "The family.")
    vocab_size: int = key(103168, "Rows of the embedding table.", ge=1)
    rms_norm_eps: float = key(1e-6, "Added to the mean square.", gt=0)
    has_bias: bool = key(True, "Biases on all four projections of the attention.")
    pad_token_id: int = key(2, "Id that carries no loss; -1 = nothing is padding.", ge=-1)
    rotary_dtype: Dtype = key("float16", "Type of the rotary tables.")
    max_decode_length: int = key(
        512, "Longest text, prompt included, when neither max_length nor max_new_tokens is given.", ge=1
    )


class FalconConfig(DecoderConfig):
    """Falcon: LayerNorm, GELU, ALiBi or rotary positions, sequential or parallel layers. (Ours.)"""

    type: Literal["FalconConfig"] = key(..., "The family.")
    vocab_size: int = key(65024, "Rows of the embedding table.", ge=1)
    hidden_size: int = key(4544, "Width of the residual stream.", ge=1)
    num_heads: int = key(71, "Number of query heads.", ge=1)
    num_kv_heads: int | None = key(None, "Key and value heads of the new decoder; null = num_heads.", ge=1)
    ffn_hidden_size: int | None = key(None, "Width of the feed-forward; null = 4 hidden_size.", ge=1)
    layer_norm_epsilon: float = key(1e-5, "Added to the variance.", gt=0)
    alibi: bool = key(False, "Positions as a bias that falls with distance; False = rotary.")
    parallel_attn: bool = key(True, "Attention and feed-forward read the same input.")
    multi_query: bool = key(True, "One key and value head (old decoder).")
    new_decoder_architecture: bool = key(False, "Falcon 40B's layer: grouped heads, one or two norms.")
    num_ln_in_parallel_attn: Literal[1, 2] | None = key(
        None, "Norms of the new decoder's layer: one for both branches (Falcon 11B), or one for each; null = 2."
    )
    bias: bool = key(False, "Biases on all linear layers.")
    bos_token_id: int = key(11, "Id of the text's beginning.", ge=0)
    eos_token_id: int | list[int] = key(11, "Id, or ids, that end a text.")
    tie_word_embeddings: bool = key(True, "The head is the embedding table.")

    @model_validator(mode="after")
    def _values_fit(self) -> "FalconConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.num_ln_in_parallel_attn == 2 and not self.new_decoder_architecture:
            raise ValueError("num_ln_in_parallel_attn 2 needs new_decoder_architecture True")
        if self.alibi and self.extend_method != "None":
            raise ValueError(f"alibi has no rotary positions that extend_method {self.extend_method} could scale")
        return self


class ArchSection(Section):
    """Which network is built."""

    type: Literal[
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaForQuestionAnswering",
        "InternLMForCausalLM",
        "InternLMForSequenceClassification",
        "InternLMForTokenClassification",
        "InternLMForQuestionAnswering",
        "FalconForCausalLM",
        "FalconForSequenceClassification",
        "FalconForTokenClassification",
        "FalconForQuestionAnswering",
    ] = key(..., "The network.")


class ModelSection(Section):
    """The network and its configuration (`model_config` of the YAML is `config` in Python: pydantic has its own)."""

    arch: ArchSection = key(..., "Which network is built.")
    config: Annotated[LlamaConfig | InternLMConfig | FalconConfig, Field(discriminator="type")] = Field(
        alias="model_config", description="Sizes, types and generation; the family is told by `type`."
    )

    @model_validator(mode="after")
    def _arch_fits(self) -> "ModelSection":
        if self.arch.type.split("For")[0] != self.config.type.removesuffix("Config"):
            raise ValueError(f"arch.type {self.arch.type} does not go with model_config.type {self.config.type}")
        return self


class TokenizerSection(Section):
    """The tokenizer of prediction and evaluation."""

    type: Literal[
        "LlamaTokenizer", "LlamaTokenizerFast", "InternLMTokenizer", "FalconTokenizer", "PreTrainedTokenizerFast"
    ] = key("LlamaTokenizer", "Kept for MindFormers' files; the file decides.")
    vocab_file: str | None = key(None, "tokenizer.model or tokenizer.json, or a folder that holds one.")
    add_bos_token: bool | None = key(None, "Begin a text with its bos id; null: where Hugging Face's tokenizer does.")
    add_eos_token: bool | None = key(None, "End a text with its eos id; null: where Hugging Face's tokenizer does.")


class ProcessorSection(Section):
    """How a prompt becomes ids."""

    type: Literal["LlamaProcessor", "InternLMProcessor", "FalconProcessor"] = key(
        "LlamaProcessor", "Kept for MindFormers' files."
    )
    tokenizer: TokenizerSection = key(TokenizerSection.model_construct(), "The tokenizer.")
    chat_template: str | None = key(
        None,
        "How `chat` writes a conversation, and how InternLMProcessor wraps prompts: internlm, none (as it is), "
        "tokenizer (the template in its folder), a path to a Jinja template, or a fastchat template; null = internlm "
        "for InternLMProcessor, else vicuna_v1.1. (Ours.)",
    )

    @property
    def conversation_format(self) -> str:
        """The format of a conversation in `chat`."""
        return self.chat_template or ("internlm" if self.type == "InternLMProcessor" else "vicuna_v1.1")

    @property
    def prompt_format(self) -> str:
        """What wraps the prompts of a predict run: only InternLMProcessor does, as in MindFormers."""
        return self.conversation_format if self.type == "InternLMProcessor" else "none"
