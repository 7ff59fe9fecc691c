"""Where the adapter tools learn what model they are about."""

from __future__ import annotations

import json

import pytest

from llm_core.errors import UserError
from llm_core.peft.run_facts import run_facts

RUN = """\
run_mode: finetune
context: {device_target: CPU}
load_checkpoint: the/base
adapter_id: earlier
model:
  arch: {type: LlamaForCausalLM}
  model_config:
    {type: LlamaConfig, seq_length: 16, vocab_size: 48, hidden_size: 32, num_layers: 2, num_heads: 4,
     intermediate_size: 40, pet_config: {pet_type: lora, lora_rank: 3}}
"""
HF = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def output(tmp_path):
    """The output_dir of a run, with a checkpoint."""
    folder = tmp_path / "output"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text(RUN)
    (folder / "checkpoint" / "rank_0").mkdir(parents=True)
    (folder / "checkpoint" / "rank_0" / "x-1_2.safetensors").touch()
    return folder


@pytest.fixture
def hf(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize("place", ["", "checkpoint", "checkpoint/rank_0", "checkpoint/rank_0/x-1_2.safetensors"])
def test_a_run_keeps_its_configuration(output, place):
    facts = run_facts(None, ["a_name", None, str(output / place)])
    assert facts.spec.vocab_size == 48 and facts.pet.lora_rank == 3
    assert (facts.load_checkpoint, facts.adapter_id) == ("the/base", "earlier")
    assert facts.config.context.device_target == "CPU"


def test_the_last_run_of_a_folder_counts(output):
    for number in (2, 9, 10):
        text = RUN.replace("lora_rank: 3", f"lora_rank: {number}")
        (output / "run" / f"config-{number}.yaml").write_text(text)
    (output / "run" / "config-old.yaml").write_text("no run's")
    assert run_facts(None, [str(output)]).pet.lora_rank == 10


@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_a_hugging_face_folder_has_its_config(hf, output, place):
    facts = run_facts(None, [str(hf / place), str(output)])
    assert facts.spec.vocab_size == 50 and facts.config is None and facts.pet is None


@pytest.mark.parametrize("place", ["", "config.json"])
def test_what_is_named_wins(hf, output, place):
    assert run_facts(str(hf / place), [str(output)]).spec.vocab_size == 50
    assert run_facts(str(output / "run" / "config.yaml"), [str(hf)]).spec.vocab_size == 48


def test_a_base_with_a_sliding_window(hf, output):
    """Weights have no length; and what a run's flag said of its own is in its record."""
    mistral = {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 2}
    (hf / "config.json").write_text(json.dumps(HF | mistral))
    assert run_facts(None, [str(hf)]).spec.num_kv_heads == 2
    record = output / "run" / "config.yaml"
    record.write_text(RUN.replace("the/base", str(hf)))
    facts = run_facts(None, [str(output)])
    assert (facts.spec.num_kv_heads, facts.spec.max_position) == (2, 16)
    record.write_text(record.read_text().replace("seq_length: 16", "seq_length: 17"))
    with pytest.raises(UserError, match="not supported for a context of 17"):
        run_facts(None, [str(output)])


def test_where_nothing_says_it_the_way_out_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(RUN)
    (tmp_path / "weights").mkdir()
    with pytest.raises(UserError, match=r"weights do not say what model this is; name its run file, .* with --config"):
        run_facts(None, ["a_name", str(tmp_path / "weights")])  # no checkpoint folder of the run beside it
