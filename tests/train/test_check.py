"""check: every problem of a run in one go, and none where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_core.checkpoint.lock import lock_output_dir
from llm_core.config import load_config
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec, spec_from_config
from llm_core.train.check import check
from llm_core.train.resume import store_of

WriteConfig = Callable[..., Path]


def table(text: str) -> dict[str, str]:
    """What was looked at -> "VERDICT text"."""
    lines = [line for line in text.splitlines() if line[:1] in "OPn"]
    return {line[8:19].strip(): f"{line[:8].strip()} {line[19:]}" for line in lines}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_concat": True, "qkv_bias": True},
        {"tied_head": True, "output_bias": True},
        {"norm": "layer", "mlp": "gelu", "mlp_bias": True, "position": "alibi"},
        {"norm": "layer", "mlp": "gelu", "residual": "parallel", "qkv_concat": True},
        {"norm": "layer", "mlp": "gelu", "residual": "parallel_two_norms"},
    ],
)
def test_shapes_are_those_of_the_model(changes: dict) -> None:
    from llm_core.models.decoder import CausalLM

    spec = DecoderSpec(
        vocab_size=11, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_size=20,
        max_position=8, **changes,
    )  # fmt: skip
    model = {name: tuple(p.shape) for name, p in CausalLM(spec, seed=None).parameters_dict().items()}
    assert parameter_shapes(spec) == model
    assert sum(int(np.prod(shape)) for shape in model.values()) == spec.num_parameters


def test_a_sound_run(write_config: WriteConfig, spm_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(
        processor={"tokenizer": {"vocab_file": str(spm_model)}}, model__model_config__vocab_size=512,
        runner_config__gradient_accumulation_steps=2, runner_config__epochs=3,
    )  # fmt: skip
    assert check(load_config(config)) == 0
    text = capsys.readouterr().out
    found = table(text)
    assert found["steps"].startswith("OK 11 an epoch x 3 epochs = 33 steps, ") and "about" not in found["steps"]
    assert found["hashes"] == "OK 2 files are as their manifest says"
    assert "84 records of 25 tokens" in found["train data"]
    assert "512 tokens, bos 1, eos 2" in found["tokenizer"]
    assert found["disk"].startswith("OK 101 checkpoints of ")
    assert "[[" in text.split("first", 1)[1] and "nothing would stop this run" in text


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data_parallel": 2, "model_parallel": 2}, "OK dp2 x tp2: 4 ranks, 8,544 parameters"),
        ({"model_parallel": 3}, "PROBLEM parallel_config.model_parallel: 3 does not divide num_heads, 4"),
        ({"pipeline_stage": 2, "micro_batch_num": 2}, "PROBLEM parallel_config.pipeline_stage: 1 layers on 2 pipeline"),
    ],
)
def test_the_layout_is_looked_at_before_any_rank_is_started(
    sizes: dict[str, int], said: str, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    check(load_config(write_config(use_parallel=True, parallel_config=sizes)))
    found = table(capsys.readouterr().out)
    assert found["layout"].startswith(said), found["layout"]
    assert found["config"].startswith("OK")


def test_finds_the_checkpoint_that_the_run_would_resume_from(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a CheckpointMonitor, too: a stop signal has saved under the model's name."""
    loaded = load_config(write_config(callbacks=[], resume_training=True))
    path = store_of(loaded.config).save(1, 3, {"w": np.zeros(2, np.float32)}, {})
    assert check(loaded) == 0
    assert table(capsys.readouterr().out)["resume"] == f"OK from {path}"


def test_counts_learnt_tokens_as_the_loss_does(
    write_config: WriteConfig, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_core.data.batch import Batch, shift
    from llm_core.data.records import RecordFile

    rows = RecordFile(records).read(np.arange(84))
    learnt = (shift(Batch(rows["input_ids"], rows["labels"], np.arange(84)), 0)[1] != -100).sum()
    check(load_config(write_config()))
    assert f", {learnt:,} learnt tokens an epoch" in table(capsys.readouterr().out)["steps"]


def test_all_problems_at_once(
    write_config: WriteConfig, spm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    config = write_config(
        processor={"tokenizer": {"vocab_file": str(spm_model)}}, output_dir=str(tmp_path / "file" / "out"),
        load_checkpoint=str(tmp_path / "nothing.ckpt"), model__model_config__seq_length=32,
    )  # fmt: skip
    assert check(load_config(config)) == 2
    text = capsys.readouterr().out
    found = table(text)
    assert "PROBLEM" in found["output"] and "cannot write there" in found["output"]
    assert "PROBLEM" in found["tokenizer"] and "512 tokens, and the model has only 96" in found["tokenizer"]
    assert "PROBLEM" in found["train data"] and "a record holds 25 input_ids" in found["train data"]
    assert "PROBLEM" in found["weights"] and "nothing.ckpt" in found["weights"]
    assert "4 problems" in text


def test_ids_beyond_the_vocabulary(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(load_config(write_config(model__model_config__vocab_size=20))) == 2
    found = table(capsys.readouterr().out)
    assert "PROBLEM" in found["ids"] and "outside the model's vocabulary 0 .. 19" in found["ids"]
    assert found["steps"].startswith("OK 21 an epoch")


def test_nothing_to_learn(write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_core.data.records import RecordWriter

    path = tmp_path / "silent.mindrecord"
    with RecordWriter(path, {"input_ids": 25, "labels": 25}) as writer:
        writer.write_rows({"input_ids": np.ones((4, 25), np.int32), "labels": np.full((4, 25), -100, np.int32)})
    assert check(load_config(write_config(train_dataset__data_loader__dataset_dir=str(path)))) == 2
    assert "not one token of 4 records is learnt" in table(capsys.readouterr().out)["ids"]


def test_no_room_on_the_disk(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    many = {"type": "CheckpointMonitor", "keep_checkpoint_max": 10**10}
    assert check(load_config(write_config(callbacks=[many]))) == 2
    assert "keep_checkpoint_max 10000000000" in table(capsys.readouterr().out)["disk"]


def test_another_run_on_the_folder(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_output_dir(tmp_path / "out"):
        assert check(load_config(write_config())) == 2
    assert "another run is writing here" in table(capsys.readouterr().out)["output"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t, None),
        (lambda t: {k: v for k, v in t.items() if "layers.0.attention.wq" not in k}, "1 missing"),
        (
            lambda t: {**t, "lm_head.weight": t["lm_head.weight"][:50]},
            r"lm_head.weight is [50, 32] in the file and [96, 32]",
        ),
        (lambda t: {"other": t["lm_head.weight"]}, "0 parameters matched"),
    ],
)
def test_weights_by_their_heads(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, said: str | None
) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "weights.safetensors"
    config = load_config(write_config(load_checkpoint=str(path)))
    shapes = parameter_shapes(spec_from_config(config.config.model))
    save_file(change({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}), path)
    assert check(config) == (2 if said else 0)
    assert (said or "OK") in table(capsys.readouterr().out)["weights"]


def test_mindspore_is_not_imported(write_config: WriteConfig) -> None:
    code = (
        "import sys; from llm_core.config import load_config; from llm_core.train.check import check; "
        f"code = check(load_config({str(write_config())!r})); sys.exit(9 if 'mindspore' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
