"""tools/transform_ckpt.py, run in this process as the shell would run it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "checkpoint"))

from checkpoint_samples import assert_same, write  # noqa: E402
from layout_samples import LAYOUTS, SPECS, parts, shares, whole_tensors  # noqa: E402
from rank_stores import save_all, stores  # noqa: E402

from llm_core.checkpoint.store import CheckpointStore  # noqa: E402
from llm_core.checkpoint.weights import read_weights  # noqa: E402

SPEC = SPECS["llama"]
TENSORS = whole_tensors(SPEC)
RUN = """\
run_mode: finetune
context: {device_target: CPU}
use_parallel: True
parallel_config: {data_parallel: 1, model_parallel: 2, pipeline_stage: 2, micro_batch_num: 2}
model:
  arch: {type: LlamaForCausalLM}
  model_config:
    {type: LlamaConfig, seq_length: 16, vocab_size: 16, hidden_size: 16, num_layers: 4, num_heads: 4, n_kv_heads: 2,
     intermediate_size: 24, tie_word_embeddings: False}
"""


@pytest.fixture
def transform(capsys):
    """transform("--flag", value, ...) -> (exit code, everything that was said)."""
    spec = importlib.util.spec_from_file_location("transform_ckpt", ROOT / "tools" / "transform_ckpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        try:
            code = module.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def output(tmp_path):
    """The output_dir of a run of dp2 x tp2 with ZeRO 1."""
    folder = tmp_path / "output"
    save_all(stores(folder, LAYOUTS["dp2_tp2_zero1"], SPEC, file_format="ckpt"), 5, TENSORS)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(RUN)
    return folder


def test_to_one_file_and_back_as_the_run_was(tmp_path, output, transform):
    code, said = transform("--src_ckpt_dir", output, "--dst_ckpt_dir", tmp_path / "one")
    assert code == 0 and "one process" in said
    file = tmp_path / "one" / "rank_0" / "checkpoint_0.ckpt"
    assert [path for path in (tmp_path / "one").rglob("*.ckpt")] == [file]
    assert_same(read_weights(file), TENSORS)
    sizes = ("--dp", 2, "--mp", 2, "--zero_stage", 1, "--format", "safetensors", "--prefix", "w_")
    code, said = transform(
        "--src_ckpt_dir", tmp_path / "one", "--dst_ckpt_dir", tmp_path / "back", "--config", output / "run/config.yaml",
        "--pp", 1, *sizes,
    )  # fmt: skip
    assert code == 0 and "dp2 x tp2 zero 1" in said
    store = CheckpointStore(tmp_path, "m")
    for share in shares(SPEC, LAYOUTS["dp2_tp2"]):
        store.share = share  # ZeRO's threshold leaves tensors of this size whole
        path = tmp_path / "back" / f"rank_{share.rank}" / f"w_{share.rank}.safetensors"
        tensors, state, epoch, step = store.read(path)
        assert (state["step"], epoch, step) == (5, 1, 5)
        assert_same(tensors, parts(TENSORS, share))


def test_to_the_layout_of_a_run_file(tmp_path, output, transform):
    (tmp_path / "run.yaml").write_text(RUN)
    code, said = transform(
        "--src_ckpt_dir", output, "--dst_ckpt_dir", tmp_path / "b", "--config", tmp_path / "run.yaml"
    )
    assert code == 0 and "tp2 x pp2" in said
    assert len(list((tmp_path / "b" / "strategy").iterdir())) == 4
    assert_same(read_weights(tmp_path / "b"), TENSORS)


def test_by_strategy_files_of_files_without_manifests(tmp_path, transform):
    """What MindFormers leaves: slices, and the strategy beside them."""
    tensors = {name: array for name, array in TENSORS.items() if array.ndim}
    for name, folder in (("tp2_pp2", tmp_path / "a"), ("dp4_zero3", tmp_path / "b")):
        for share in shares(SPEC, LAYOUTS[name]):
            held = parts(tensors, share)
            (folder / f"rank_{share.rank}").mkdir(parents=True)
            write(folder / f"rank_{share.rank}" / "mf.ckpt", held)
            share.save_strategy(folder, {key: array.shape for key, array in held.items()})
    code, said = transform("--src_ckpt_dir", tmp_path / "a", "--dst_ckpt_dir", tmp_path / "c")
    assert code == 2 and "--src_ckpt_strategy" in said
    code, said = transform(
        "--src_ckpt_dir", tmp_path / "a", "--dst_ckpt_dir", tmp_path / "c",
        "--src_ckpt_strategy", tmp_path / "a/strategy", "--dst_ckpt_strategy", tmp_path / "b/strategy",
    )  # fmt: skip
    assert code == 0 and "4 files" in said
    for share in shares(SPEC, LAYOUTS["dp4_zero3"]):
        file = tmp_path / "c" / f"rank_{share.rank}" / f"checkpoint_{share.rank}.ckpt"
        alone = tmp_path / f"alone_{share.rank}.ckpt"  # beside no manifest and no other rank: what is in the file
        alone.write_bytes(file.read_bytes())
        assert_same(read_weights(alone), parts(tensors, share))
    assert_same(read_weights(tmp_path / "c"), tensors)


def snapshot(folder):
    """Content by file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_source_is_not_replaced(tmp_path, output, transform):
    """Killed halfway, neither the one nor the other would be whole."""
    config = ("--config", output / "run/config.yaml")
    assert transform("--src_ckpt_dir", output, "--dst_ckpt_dir", tmp_path / "a", *config)[0] == 0
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = snapshot(tmp_path)
    for source, target in (("a", "a"), ("link", "a"), ("a", "link"), ("output", "output"), ("a/rank_0", "a")):
        flags = ("--src_ckpt_dir", tmp_path / source, "--dst_ckpt_dir", tmp_path / target)
        for more in ((), (*config, "--dp", 2)):
            code, said = transform(*flags, *more)
            assert code == 2 and f"{tmp_path / target}" in said and "another folder" in said
    assert snapshot(tmp_path) == before


def test_one_rank_alone_is_not_taken_for_all_from_within_its_folder(tmp_path, monkeypatch, transform):
    tensors = {name: array for name, array in TENSORS.items() if array.ndim}
    for share in shares(SPEC, LAYOUTS["tp2"]):
        folder = tmp_path / f"rank_{share.rank}"
        folder.mkdir()
        write(folder / "mf.ckpt", parts(tensors, share))
    monkeypatch.chdir(tmp_path / "rank_0")
    code, said = transform("--src_ckpt_dir", "mf.ckpt", "--dst_ckpt_dir", tmp_path / "out")
    assert code == 2 and "--src_ckpt_strategy" in said


def test_what_cannot_be_done_is_said(tmp_path, output, transform):
    to = ("--dst_ckpt_dir", tmp_path / "out")
    assert transform("--src_ckpt_dir", output, *to, "--mp", 3)[0] == 2
    code, said = transform("--src_ckpt_dir", output, *to, "--dp", 0)
    assert code == 2 and "dp 0" in said
    code, said = transform("--src_ckpt_dir", output, *to, "--zero_stage", 4)
    assert code == 2 and "--zero_stage is 0, 1, 2 or 3" in said
    code, said = transform("--src_ckpt_dir", output, *to, "--mp", 2, "--dst_ckpt_strategy", output)
    assert code == 2 and "leave --mp out" in said
    write(tmp_path / "w.safetensors", {"w": np.zeros(2, np.float32)})
    code, said = transform("--src_ckpt_dir", tmp_path / "w.safetensors", *to, "--mp", 2)
    assert code == 2 and "--config" in said
    assert not (tmp_path / "out").exists()
