"""The verb `plan`: what it prints, of models that no test could allocate; its messages; how quickly it answers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_core import cli
from llm_core.config import load_config
from llm_core.data.loader import Loader
from llm_core.data.manifest import FORMAT, write_json
from llm_core.data.records import RecordFile, RecordWriter
from llm_core.models.spec import spec_from_config
from llm_core.parallel.layout import Layout
from llm_core.plan import count_parts, plan
from llm_core.plan.job import job_of, steps_of

ROOT = Path(__file__).resolve().parents[2]
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
    assert any(line.startswith("LlamaForCausalLM: ") for line in printed.splitlines())
    assert "AN ESTIMATE, nothing was run: dp8 zero 1 on 8 x 910B" in printed


def test_targets_that_match_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "run.yaml"
    path.write_text(INTERNLM_LORA.replace(".*wq|.*wk|.*wv|.*wo", "q_proj"))
    assert cli.main(["plan", "--config", str(path)]) == 2
    assert "q_proj" in capsys.readouterr().err


def run_plan(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What `plan` prints for these arguments."""
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_a_layout_that_fits_is_shown_with_its_stages(capsys: pytest.CaptureFixture):
    printed = run_plan(capsys, "--config", "pretrain_llama2_70b")
    assert "dp2 x tp4 x pp8 zero 1 on 64 x 910B" in printed
    assert "256 records of 4,096 tokens = 1,048,576 tokens, in 128 micro-batches of 1" in printed
    assert sum(line.split()[1] == "to" for line in printed.splitlines() if line[:1].isdigit()) == 8  # a row a stage
    assert "of 56.00 GiB: it fits" in printed  # max_device_memory, not the device's 64
    assert "what makes it fit" not in printed


def test_one_that_does_not_fit_comes_with_three_changes_that_do(capsys: pytest.CaptureFixture):
    printed = run_plan(capsys, "--config", "pretrain_llama2_7b", "--use_parallel", "False")
    assert "of 58.00 GiB: IT DOES NOT FIT" in printed
    rows = printed.partition("what makes it fit, cheapest first:")[2].splitlines()[3:]
    assert len(rows) == 3
    cells = [re.split(r"  +", row) for row in rows]
    assert all(float(size) <= 58 for _, _, _, size, *_ in cells)
    assert "LoRA" in rows[0] and [int(devices) for _, _, devices, *_ in cells] == [1, 4, 4]  # more devices come last


def test_the_table_of_layouts_is_sorted_and_fits(capsys: pytest.CaptureFixture):
    printed = run_plan(capsys, "--config", "pretrain_llama2_7b", "--devices", "8")
    rows = [line.split() for line in printed.partition("layouts of 8 that fit")[2].splitlines()[3:]]
    assert len(rows) > 3
    assert all(int(dp) * int(tp) * int(pp) == 8 for dp, tp, pp, *_ in rows)
    seconds = [float(row[7]) for row in rows]
    assert seconds == sorted(seconds)
    assert all(float(row[6]) <= 58 for row in rows)


def test_another_number_of_devices_shows_the_best_layout_of_it(capsys: pytest.CaptureFixture):
    printed = run_plan(capsys, "--config", "pretrain_llama2_7b", "--devices", "16", "--device", "a100")
    assert "the run file's own layout has 8 ranks; below is the best of 16" in printed
    assert "on 16 x A100 (80 GiB, 312 TFLOP/s)" in printed


def test_where_nothing_fits_it_says_what_comes_nearest(capsys: pytest.CaptureFixture):
    printed = run_plan(capsys, "--config", "pretrain_llama2_70b", "--devices", "8")
    assert "IT DOES NOT FIT" in printed and "no layout fits on 8: the least is " in printed
    assert "what makes it fit" in printed


def test_steps_come_from_the_manifest_beside_the_records(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = tmp_path / "wiki.mindrecord"
    write_json(tmp_path / "wiki.mindrecord.manifest.json", {"format": FORMAT, "records": 1003})
    arguments = ["--config", "pretrain_llama_demo", "--train_dataset_dir", str(data), "--epochs", "3"]
    assert "the run: 375 steps" in run_plan(capsys, *arguments)  # 125 full batches of 8
    more = ["--train_dataset.drop_remainder", "False", "--gradient_accumulation_steps", "2"]
    assert "the run: 189 steps" in run_plan(capsys, *arguments, *more)  # 63 windows of 16
    assert "the run: 189 steps" in run_plan(capsys, *arguments, *more[2:])  # of 125 batches, the last one alone
    assert "the run: 5 steps" in run_plan(capsys, *arguments, "--runner_config.stop_step", "5")
    assert "the run: 18 steps" in run_plan(capsys, *arguments, "--num_samples", "50")
    without = ["--config", "pretrain_llama_demo", "--train_dataset_dir", str(tmp_path / "other.mindrecord")]
    assert "how many steps it has, the records say" in run_plan(capsys, *without)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "B200"], "--device B200: unknown device; give one of 910A, 910B, A100, H100, H200, cpu"),
        (["--devices", "0"], "--devices 0: give a number of devices, 1 or more"),
        (["--devices", "101"], "no layout of so many ranks goes with this model"),
        (["--devices", "999999937"], "2048 devices can be used"),
        (["--devices", "eight"], "invalid int value: 'eight'"),
        (["--mp", "5"], "parallel_config.model_parallel: 5 does not divide num_heads, 32"),
        (["--pp", "64", "--micro_batch_num", "2"], "do not fill 64 pipeline stages"),
        (["--pp", "40", "--micro_batch_num", "64"], "32 layers on 40 pipeline pieces"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    assert cli.main(["plan", "--config", "pretrain_llama2_7b", *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_records_that_do_not_fill_a_step_are_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_json(tmp_path / "few.mindrecord.manifest.json", {"format": FORMAT, "records": 5})
    data = str(tmp_path / "few.mindrecord")
    assert cli.main(["plan", "--config", "pretrain_llama_demo", "--train_dataset_dir", data]) == 2
    assert "5 records do not fill one batch of 8" in capsys.readouterr().err


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("sizes", [(12, 8, 1, 2), (37, 4, 2, 3), (48, 4, 2, 3), (9, 4, 2, 1)])
def test_steps_are_those_that_the_loader_gives(tmp_path: Path, drop: bool, sizes: tuple[int, ...]):
    """Short windows at an epoch's end, as the run takes them: also where there is no full one."""
    records, rows, dp, window = sizes
    path = tmp_path / "r.mindrecord"
    with RecordWriter(path, columns={"input_ids": 5}, manifest={}) as writer:
        writer.write_rows({"input_ids": np.ones((records, 5), np.int32)})
    opened = RecordFile(path)
    loader = Loader(opened, batch_size=rows, world=dp, seq_length=4, drop_remainder=drop, vocab_size=9)
    opened.close()
    loaded = load_config("pretrain_llama_demo", [
        ("train_dataset.data_loader.dataset_dir", str(path)), ("train_dataset.drop_remainder", drop),
        ("runner_config.batch_size", rows), ("runner_config.epochs", 2),
    ])  # fmt: skip
    job = job_of(loaded, None, dp, window)
    assert steps_of(loaded, job, Layout(dp=dp)) == 2 * math.ceil(loader.steps_per_epoch / window)


def test_a_prediction_has_parameters_alone(capsys: pytest.CaptureFixture):
    printed = run_plan(capsys, "--config", "predict_llama2_7b")
    assert "6,738,415,616" in printed and "AN ESTIMATE" not in printed


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from llm_core.cli import main\n"
        "assert main(['plan', '--config', 'lora_llama2_7b', '--devices', '16']) == 0\n"
        "print('loaded:', sorted({'mindspore', 'numpy', 'tqdm', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout[-300:] + done.stderr[-2000:]


def test_70b_on_1024_ranks_takes_no_time():
    """In processor time, which other programs do not lengthen: one layout, then the search over all of them."""
    loaded = load_config("pretrain_llama2_70b", [("parallel_config.data_parallel", 32)])
    began = time.process_time()
    assert "on 1024 x 910B" in plan(loaded)
    one = time.process_time() - began
    assert "layouts of 1024 that fit" in plan(loaded, 1024)
    assert one < 0.1
    assert time.process_time() - began - one < 0.8
