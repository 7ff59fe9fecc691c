"""The verb `plan`: parameters by part, of models that no test could allocate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llm_core import cli
from llm_core.config import load_config
from llm_core.models.spec import spec_from_config
from llm_core.plan import count_parts, plan

ROOT = Path(__file__).resolve().parent.parent
INTERNLM_LORA = """
model:
  arch: {type: InternLMForCausalLM}
  model_config:
    type: InternLMConfig
    hidden_size: 4096
    num_layers: 32
    num_heads: 32
    pet_config: {pet_type: lora, lora_rank: 8, target_modules: '.*wq|.*wk|.*wv|.*wo'}
"""
FALCON_40B = """
model:
  arch: {type: FalconForCausalLM}
  model_config:
    {type: FalconConfig, hidden_size: 8192, num_layers: 60, num_heads: 128, num_kv_heads: 8,
     new_decoder_architecture: True}
"""


@pytest.fixture
def parts(tmp_path: Path):
    """parts(text of a run file) -> its parts' counts, and what is printed."""

    def parts(text: str) -> tuple[dict[str, tuple[int, int]], str]:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        loaded = load_config(path)
        model = loaded.config.model
        return count_parts(spec_from_config(model), model.config.pet_config), plan(loaded)

    return parts


def test_lora_of_internlm_has_the_published_share(parts):
    counts, printed = parts(INTERNLM_LORA)
    assert counts["adapter"] == (8_388_608, 8_388_608)
    assert counts["embedding"] == counts["head"] == (103168 * 4096, 0)
    assert counts["attention"] == (32 * 4 * (4096 * 4096 + 4096), 0)
    assert counts["feed-forward"] == (32 * 3 * 4096 * 11008, 0)
    assert counts["norms"] == (65 * 4096, 0)
    assert "8,388,608 trainable (0.1146% " in printed
    assert "7,321,948,160" in printed  # the base
    assert sum(every for every, _ in counts.values()) == 7_321_948_160 + 8_388_608


def test_llama_70b_learns_as_a_whole():
    loaded = load_config("pretrain_llama2_70b")
    counts = count_parts(spec_from_config(loaded.config.model), None)
    assert sum(every for every, _ in counts.values()) == 68_976_648_192
    assert all(every == learning for every, learning in counts.values())
    assert counts["attention"][0] == 80 * 8192 * (2 * 8192 + 2 * 1024)
    assert counts["adapter"] == (0, 0) and "adapter" not in plan(loaded)


def test_falcon_40b_has_two_norms_and_a_tied_head(parts):
    counts, printed = parts(FALCON_40B)
    assert counts["attention"][0] == 60 * 8192 * (2 * 8192 + 2 * 512)
    assert counts["feed-forward"][0] == 60 * 2 * 8192 * 4 * 8192
    assert counts["norms"][0] == (60 * 2 + 1) * 2 * 8192
    assert counts["head"] == (0, 0) and "the head is the embedding" in printed


def test_prefix_tuning_of_llama_7b(parts):
    loaded = load_config("finetune_llama2_7b_prefixtuning")
    model = loaded.config.model
    counts = count_parts(spec_from_config(model), model.config.pet_config)
    channels = 2 * 32 * 4096
    expected = 16 * channels + 512 * channels + 512 + channels * 512 + channels
    assert counts["adapter"] == (expected, expected)
    assert [part for part, (_, learning) in counts.items() if learning] == ["adapter"]


def test_a_classifiers_head_learns_with_the_adapter(parts):
    counts, _ = parts(INTERNLM_LORA.replace("ForCausalLM", "ForSequenceClassification"))
    assert counts["head"] == (2 * 4096, 2 * 4096)
    assert counts["adapter"][1] == 8_388_608


def test_the_verb_takes_overrides_and_prints_the_table(capsys: pytest.CaptureFixture):
    assert cli.main(["plan", "--config", "pretrain_llama2_7b", "--model.model_config.num_layers", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"{'norms':<14}{5 * 4096:>18,}{5 * 4096:>18,}" in printed.splitlines()
    assert printed.splitlines()[-1].startswith("LlamaForCausalLM: ")


def test_targets_that_match_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "run.yaml"
    path.write_text(INTERNLM_LORA.replace(".*wq|.*wk|.*wv|.*wo", "q_proj"))
    assert cli.main(["plan", "--config", str(path)]) == 2
    assert "q_proj" in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from llm_core.cli import main\n"
        "assert main(['plan', '--config', 'finetune_llama2_7b_prefixtuning']) == 0\n"
        "print('loaded:', sorted({'mindspore', 'numpy', 'tqdm', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout[-300:] + done.stderr[-2000:]
