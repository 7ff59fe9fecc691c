"""A tiny model with random weights, its tokenizer, and both as files that a run can load."""

from pathlib import Path

import numpy as np
import pytest

from llm_core.models.spec import DecoderSpec

SPEC = DecoderSpec(
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=64,
    max_position=256,
    initializer_range=0.3,  # wide enough that the next token is never a close call
)

CONFIG = """\
run_mode: predict
seed: 5
load_checkpoint: {folder}/weights.safetensors
output_dir: {folder}/output
context: {{device_target: CPU}}
processor: {{tokenizer: {{vocab_file: {tokenizer}}}}}
model:
  arch: {{type: LlamaForCausalLM}}
  model_config:
    type: LlamaConfig
    vocab_size: 512
    hidden_size: 32
    num_layers: 2
    num_heads: 4
    n_kv_heads: 2
    intermediate_size: 64
    seq_length: 256
    compute_dtype: float32
    rotary_dtype: float32
    param_init_type: float32
    do_sample: False
    max_new_tokens: 8
"""


@pytest.fixture(scope="session", autouse=True)
def graph_mode():
    """As `runtime.start` sets it."""
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")


@pytest.fixture(scope="session")
def spec():
    return SPEC


@pytest.fixture(scope="session")
def net():
    from llm_core.models.decoder import CausalLM

    return CausalLM(SPEC, seed=3).set_train(False)


@pytest.fixture(scope="session")
def generator(net):
    """One for the whole session, so that each graph is compiled once. No token ends a text."""
    from llm_core.infer.generate import Generator

    return Generator(net, SPEC, eos_ids=[], pad_id=0)


@pytest.fixture(scope="session")
def tokenizer(spm_model):
    from llm_core.text import load_tokenizer

    return load_tokenizer(spm_model)


@pytest.fixture(scope="session")
def run_file(tmp_path_factory, net, spm_model):
    """A predict run over the tiny model: its YAML's path."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("tiny")
    tensors = {name: weight.asnumpy() for name, weight in net.parameters_and_names()}
    save_file(tensors, folder / "weights.safetensors")
    (folder / "predict.yaml").write_text(CONFIG.format(folder=folder, tokenizer=spm_model))
    return folder / "predict.yaml"


@pytest.fixture(scope="session")
def golden():
    """What transformers 4.55.4 generated; made by tools/make_golden.py generation."""
    with np.load(Path(__file__).parent.parent / "golden" / "generation.npz") as file:
        return dict(file)
