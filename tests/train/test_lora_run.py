"""Runs that train an adapter: what they save, resume, refuse, and what is predicted and evaluated with it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm_core.checkpoint.files import read_heads
from llm_core.checkpoint.manifest import read_manifest
from llm_core.checkpoint.weights import read_weights
from llm_core.config import load_config
from llm_core.config.model_section import LoraConfig
from llm_core.errors import UserError
from llm_core.infer.load import load_for_inference
from llm_core.peft.apply import is_adapter_name
from llm_core.peft.hf_adapter import write_adapter
from llm_core.peft.merge import merge_lora
from llm_core.report.metrics import read_metrics
from llm_core.train.check import check
from llm_core.train.loop import Run, fit
from llm_core.train.run import build, train

ROOT = Path(__file__).parents[2]
LORA = {
    "pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ".*wq|.*wv|.*w2",
}  # fmt: skip
TOKENS = np.arange(1, 41, dtype=np.int32).reshape(2, 20)


@pytest.fixture(scope="session")
def base(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a tiny base model, that another file may be laid beside."""
    from safetensors.numpy import save_file

    from llm_core.peft.apply import build_net

    folder = tmp_path_factory.mktemp("base")
    net = build_net(_spec(), None, seed=9)
    save_file({name: p.asnumpy() for name, p in net.parameters_dict().items()}, folder / "base.safetensors")
    return folder


def _spec():
    from llm_core.models.spec import DecoderSpec

    return DecoderSpec(
        vocab_size=96, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
        max_position=24, initializer_range=0.2,
    )  # fmt: skip


@pytest.fixture
def lora_config(write_config, base):
    """lora_config(**overrides) -> the YAML of a LoRA run on `base`."""

    def write(**overrides: object) -> Path:
        return write_config(
            **{
                "load_checkpoint": str(base / "base.safetensors"),
                "model__model_config__pet_config": LORA,
                "optimizer__weight_decay": 0.0,
                **overrides,
            }
        )

    return write


def run_of(config: Path, *overrides: tuple[str, str]) -> Run:
    return build(load_config(config, overrides))


def losses(output_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(output_dir / "metrics.jsonl") if "loss" in entry]


def state(run: Run) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in run.snapshot().items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def loaded_net(config: Path, *overrides: tuple[str, str]):
    """The model as eval and predict load it."""
    loaded = load_config(config, [("run_mode", "eval"), *overrides])
    return load_for_inference(loaded, need_tokenizer=False)[0]


def values(net) -> dict[str, np.ndarray]:
    """Base and adapter."""
    return {name: parameter.asnumpy() for name, parameter in net.parameters_dict().items()}


def merged(net) -> dict[str, np.ndarray]:
    """Base and adapter of a training's network as `loaded_net` has them: plain weights."""
    every = values(net)
    adapter = {name: value for name, value in every.items() if is_adapter_name(name)}
    base = {name: value for name, value in every.items() if name not in adapter}
    return dict(merge_lora(base, adapter, net.graph_key["adapter"]))


def logits(net) -> np.ndarray:
    import mindspore as ms

    return net.set_train(False)(ms.Tensor(TOKENS)).asnumpy()


def net_of(run: Run):
    return run.stepper.whole.cell.window_loss.token_loss.net


# ---- saving


def test_a_run_learns_and_saves_the_adapter_alone(lora_config, tmp_path, base, capsys):
    before = read_weights(base)
    assert train(load_config(lora_config(runner_config__epochs=3))) == 0
    curve = losses(tmp_path / "out")
    assert np.mean(curve[-5:]) < np.mean(curve[:3]) - 0.1
    assert_same(read_weights(base), before)
    err = capsys.readouterr().err
    assert "trainable (" in err and "of the base model's" in err
    file = tmp_path / "out/checkpoint/rank_0/tiny_rank_0-3_21.safetensors"
    heads = read_heads(file)
    assert all("mindpet_delta" in name for name in heads)
    assert {name.partition(".")[0] for name in heads} == {"model", "adam_m", "adam_v"}
    assert len([name for name in heads if name.startswith("model.")]) == 6
    adapter = read_manifest(file)[0].state["adapter"]
    assert adapter["pet_config"]["lora_rank"] == 4 and adapter["base"] == str(base / "base.safetensors")
    assert adapter["base_fingerprint"].keys() == before.keys()
    assert {len(value) for value in adapter["base_fingerprint"].values()} == {8}


def test_the_trainable_weights_alone_on_request(lora_config, tmp_path):
    monitor = {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 2, "save_trainable_params": True}
    assert fit(run_of(lora_config(runner_config__stop_step=2, callbacks=[monitor]))) == 0
    alone = tmp_path / "out/checkpoint_trainable/rank_0/tiny_rank_0-1_2.safetensors"
    assert sorted(read_heads(alone)) == sorted(
        name for name in read_heads(tmp_path / "out/checkpoint/rank_0" / alone.name) if not name.startswith("adam")
    )
    assert_same(
        values(loaded_net(lora_config(), ("adapter_id", str(alone)))),
        values(loaded_net(lora_config(), ("adapter_id", str(tmp_path / "out")))),
    )


# ---- going on


@pytest.mark.parametrize(("accumulation", "dora"), [(1, False), (3, True)])
def test_a_resumed_run_is_the_uninterrupted_one(lora_config, tmp_path, accumulation, dora):
    """With dropout, bit for bit; dropout's masks follow the step and the micro-batch."""
    values = {
        "runner_config__gradient_accumulation_steps": accumulation,
        "model__model_config__pet_config": LORA | {"use_dora": dora, "lora_dropout": 0.3},
    }
    whole = run_of(lora_config(**values, output_dir=str(tmp_path / "whole")), ("runner_config.stop_step", "6"))
    assert fit(whole) == 0
    parts = lora_config(**values, output_dir=str(tmp_path / "parts"))
    assert fit(run_of(parts, ("runner_config.stop_step", "4"))) == 0
    resumed = run_of(parts, ("resume_training", "True"), ("runner_config.stop_step", "6"))
    assert resumed.cursor.step == 4
    assert fit(resumed) == 0
    assert_same(state(resumed), state(whole))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_frozen_factors_are_saved_and_come_back(lora_config, tmp_path):
    """freeze_include: an adapter is whole in its checkpoint, whatever of it learns."""
    pet = LORA | {"freeze_include": ["*.wq.*"], "lora_b_init": "normal"}
    monitor = {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 2, "save_trainable_params": True}
    config = lora_config(model__model_config__pet_config=pet, callbacks=[monitor])
    run = run_of(config, ("runner_config.stop_step", "2"))
    start = {name: value for name, value in values(net_of(run)).items() if ".wq.mindpet" in name}
    assert fit(run) == 0 and len(start) == 2
    expected = values(net_of(run))
    assert_same(start, {name: expected[name] for name in start})
    alone = next((tmp_path / "out/checkpoint_trainable/rank_0").glob("*1_2.safetensors"))
    for given in (tmp_path / "out", alone):
        assert_same(values(loaded_net(config, ("adapter_id", str(given)))), merged(net_of(run)))
    again = run_of(config, ("resume_training", "True"))
    assert again.cursor.step == 2 and start.keys() <= state(again).keys()
    assert_same(values(net_of(again)), expected)
    assert not any("wq" in name for name in state(again) if name.startswith("adam"))


def test_accumulation_is_one_sum_over_the_window(lora_config, tmp_path):
    results = []
    for batch_size, accumulation in ((2, 6), (12, 1)):
        run = run_of(
            lora_config(
                runner_config__batch_size=batch_size,
                runner_config__gradient_accumulation_steps=accumulation,
                runner_config__stop_step=4,
                model__model_config__pet_config=LORA | {"lora_dropout": 0.0},
                output_dir=str(tmp_path / str(batch_size)),
                callbacks=[],
            )
        )
        assert fit(run) == 0
        results.append((losses(tmp_path / str(batch_size)), state(run)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, value in results[0][1].items():
        assert np.linalg.norm(value - results[1][1][name]) <= 1e-4 * np.linalg.norm(value), name


def test_a_killed_run_goes_on_and_comes_to_the_same_end(lora_config, tmp_path):
    def command(config: Path, *more: str) -> list[str]:
        return [sys.executable, str(ROOT / "run_llm.py"), "--config", str(config), *more]

    values = {"runner_config__epochs": 8, "callbacks": [
        {"type": "MFLossMonitor"},
        {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 5, "keep_checkpoint_max": 2},
    ]}  # fmt: skip
    whole = lora_config(**values, output_dir=str(tmp_path / "whole"))
    subprocess.run(command(whole), check=True, capture_output=True)
    killed = lora_config(**values, output_dir=str(tmp_path / "killed"))
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed/metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 30):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command(killed, "--resume_training", "True"), check=True, capture_output=True, text=True)
    assert "resuming from" in done.stderr
    ends = [read_weights(tmp_path / name) for name in ("whole", "killed")]
    assert_same(*ends)


def test_the_run_of_the_base_is_no_run_to_go_on_from(write_config, lora_config, tmp_path):
    """The base's output_dir as load_checkpoint, and the habit of adding --resume_training True from the first start."""
    assert fit(run_of(write_config(runner_config__stop_step=3, output_dir=str(tmp_path / "pretrain")))) == 0
    config = lora_config(load_checkpoint=str(tmp_path / "pretrain"), runner_config__stop_step=2)
    run = run_of(config, ("resume_training", "True"))
    assert run.cursor.step == 0
    assert fit(run) == 0
    assert run_of(config, ("resume_training", "True")).cursor.step == 2


def test_what_keeps_a_run_from_going_on(lora_config, write_config, tmp_path, base):
    assert fit(run_of(lora_config(runner_config__stop_step=2))) == 0
    again = ("resume_training", "True")
    with pytest.raises(UserError, match=r"pet_config\.lora_alpha was 8.*, is 16"):
        run_of(lora_config(model__model_config__pet_config=LORA | {"lora_alpha": 16}), again)
    with pytest.raises(UserError, match=r"an adapter alone; name its base: --load_checkpoint .*base\.safetensors"):
        run_of(lora_config(load_checkpoint=""), again)
    other = _another_base(base, tmp_path)
    with pytest.raises(UserError, match=r"trained on .*base\.safetensors, other weights than .*other\.safetensors"):
        run_of(lora_config(load_checkpoint=str(other)), again)
    assert run_of(lora_config(), again).cursor.step == 2
    assert fit(run_of(write_config(runner_config__stop_step=1, output_dir=str(tmp_path / "all")))) == 0
    with pytest.raises(UserError, match="of a run that trained all weights, and pet_config asks for an adapter"):
        run_of(lora_config(output_dir=str(tmp_path / "all")), again)


def _another_base(base: Path, folder: Path) -> Path:
    from safetensors.numpy import save_file

    weights = read_weights(base / "base.safetensors")
    weights["model.layers.0.attention.wk.weight"] = weights["model.layers.0.attention.wk.weight"] + np.float32(0.01)
    save_file(weights, folder / "other.safetensors")
    return folder / "other.safetensors"


# ---- using it


def test_several_adapters_beside_one_base_by_path_and_by_name(lora_config, tmp_path, base):
    folder = tmp_path / "models"
    shutil.copytree(base, folder)
    given = {"load_checkpoint": str(folder / "base.safetensors"), "runner_config__stop_step": 12}
    found = {}
    for name, more in (("first", {}), ("second", {"lora_rank": 2, "target_modules": "w1", "use_rslora": True})):
        out = folder / "adapters" / name
        run = run_of(lora_config(**given, output_dir=str(out), model__model_config__pet_config=LORA | more))
        assert fit(run) == 0
        found[name] = net_of(run)
    predict = lora_config(**given, model__model_config__pet_config=None)
    for name, net in found.items():
        file = next((folder / "adapters" / name / "checkpoint/rank_0").glob("*1_12.safetensors"))
        for given_id in (name, str(folder / "adapters" / name), str(file)):
            assert_same(values(loaded_net(predict, ("adapter_id", given_id))), merged(net))
    pet = LoraConfig(**LORA)
    first = {n: v for n, v in values(found["first"]).items() if "mindpet_delta" in n}
    write_adapter(folder / "adapters" / "peft", pet, first, _spec(), "tiny")
    assert_same(values(loaded_net(predict, ("adapter_id", "peft"))), merged(found["first"]))
    expected = logits(found["second"])
    np.testing.assert_allclose(logits(loaded_net(predict, ("adapter_id", "second"))), expected, atol=1e-5)
    assert abs(logits(loaded_net(predict)) - expected).max() > 1e-2
    with pytest.raises(UserError, match="adapter_id: third: no such file .*adapters, which holds first, peft, second"):
        loaded_net(predict, ("adapter_id", "third"))


def test_base_and_adapter_in_one_folder(lora_config, tmp_path, base):
    """MindFormers' habit: load_checkpoint is a folder with both."""
    assert fit(run_of(lora_config(runner_config__stop_step=5))) == 0
    together = tmp_path / "together"
    shutil.copytree(base, together)
    for file in (tmp_path / "out/checkpoint/rank_0").glob("tiny_rank_0-1_5.safetensors*"):
        shutil.copy(file, together)
    expected = values(loaded_net(lora_config(), ("adapter_id", str(tmp_path / "out"))))
    for pet in (LORA, None):
        config = lora_config(load_checkpoint=str(together), model__model_config__pet_config=pet)
        assert_same(values(loaded_net(config)), expected)
    # without its manifest, the adapter does not say how it was made
    (together / "tiny_rank_0-1_5.safetensors.manifest.json").unlink()
    assert_same(values(loaded_net(lora_config(load_checkpoint=str(together)))), expected)
    with pytest.raises(UserError, match="LoRA of rank 4 on wq, wv, w2. Add model.model_config.pet_config"):
        loaded_net(lora_config(load_checkpoint=str(together), model__model_config__pet_config=None))


def test_an_adapter_beside_a_base_with_a_standard_name(lora_config, tmp_path, base):
    """model.safetensors is what a folder stands for, and the adapter's file is found besides; so is one of PEFT."""
    assert fit(run_of(lora_config(runner_config__stop_step=2))) == 0
    expected = values(loaded_net(lora_config(), ("adapter_id", str(tmp_path / "out"))))
    saved = read_weights(tmp_path / "out")
    peft = {name: saved[name] for name in saved if name.startswith("model.")}
    write_adapter(tmp_path / "peft", LoraConfig(**LORA), peft, _spec(), "tiny")
    for name in ("model", "base"):
        ours, theirs = tmp_path / f"{name}_ours", tmp_path / f"{name}_peft"
        shutil.copytree(tmp_path / "peft", theirs)
        for folder in (ours, theirs):
            folder.mkdir(exist_ok=True)
            shutil.copy(base / "base.safetensors", folder / f"{name}.safetensors")
        for file in (tmp_path / "out/checkpoint/rank_0").glob("tiny_rank_0-1_*.safetensors*"):
            shutil.copy(file, ours)
        for folder in (ours, theirs):
            config = lora_config(load_checkpoint=str(folder), model__model_config__pet_config=None)
            assert_same(values(loaded_net(config)), expected)
    for folder in ("model_ours", "base_ours"):
        shutil.copytree(tmp_path / "peft", tmp_path / folder, dirs_exist_ok=True)
    for folder, says in (
        ("base_ours", "base_ours: 2 adapters lie beside the base: .*1_2.safetensors; name .* with --adapter_id"),
        ("model_ours", "model_ours: 2 adapters lie beside the base: .*1_2.safetensors; name .* with --adapter_id"),
        ("peft", "peft: an adapter of PEFT without its base: give it as --adapter_id .*peft, and"),
    ):
        config = lora_config(load_checkpoint=str(tmp_path / folder), model__model_config__pet_config=None)
        with pytest.raises(UserError, match=says):
            loaded_net(config)
        assert check(load_config(config)) == 2


def test_an_adapter_is_a_start(lora_config, tmp_path):
    assert fit(run_of(lora_config(runner_config__stop_step=6, output_dir=str(tmp_path / "one")))) == 0
    start = ("adapter_id", str(tmp_path / "one"))
    run = run_of(lora_config(output_dir=str(tmp_path / "two"), model__model_config__pet_config=None), start)
    assert run.cursor.step == 0
    saved = read_weights(tmp_path / "one")
    for name, value in state(run).items():
        if "adam" not in name:
            np.testing.assert_array_equal(value, saved[name])
    assert fit(run_of(lora_config(output_dir=str(tmp_path / "two"), runner_config__stop_step=3), start)) == 0
    # going on, the checkpoint says what was trained, and the start does not matter any more
    without = lora_config(output_dir=str(tmp_path / "two"), model__model_config__pet_config=None)
    for given in ((start,), ()):
        assert run_of(without, *given, ("resume_training", "True")).cursor.step == 3


def test_evaluation_and_samples_have_the_adapter_on(lora_config, records, tmp_path):
    """The loss that the training measures is that of run_mode eval with the adapter, and not that of the base."""
    evaluated = {
        "do_eval": True, "eval_step_interval": 12, "runner_config__stop_step": 12,
        "eval_dataset": {
            "data_loader": {"type": "MindDataset", "dataset_dir": str(records), "shuffle": False},
            "input_columns": ["input_ids", "labels"],
        },
    }  # fmt: skip
    config = lora_config(**evaluated)
    assert fit(run_of(config)) == 0
    (measured,) = (e["eval_loss"] for e in read_metrics(tmp_path / "out/metrics.jsonl") if "eval_loss" in e)

    from llm_core.evals.run import evaluate

    results = {}
    for name, given in (("adapter", [("adapter_id", str(tmp_path / "out"))]), ("base", [])):
        out = ("output_dir", str(tmp_path / name))
        loaded = load_config(
            lora_config(**evaluated, **({} if given else {"model__model_config__pet_config": None})),
            [("run_mode", "eval"), out, *given],
        )
        assert evaluate(loaded) == 0
        result = json.loads((tmp_path / name / "eval_result.json").read_text())
        assert result.get("adapter_id") == dict(given).get("adapter_id")
        results[name] = result["PerplexityMetric"]["loss"]
    assert results["adapter"] == pytest.approx(measured, rel=1e-6)
    assert results["base"] > measured + 0.05


def test_a_sample_of_the_training_is_what_predict_answers(lora_config, tmp_path, spm_model, capsys):
    from safetensors.numpy import save_file

    from llm_core.infer.load import load_completer
    from llm_core.infer.sampling import SamplingParams
    from llm_core.peft.apply import build_net

    net = build_net(replace(_spec(), vocab_size=512), None, seed=9)
    save_file({name: p.asnumpy() for name, p in net.parameters_dict().items()}, tmp_path / "base.safetensors")
    config = lora_config(
        load_checkpoint=str(tmp_path / "base.safetensors"),
        model__model_config__vocab_size=512,
        processor={"tokenizer": {"vocab_file": str(spm_model)}},
        callbacks=[{"type": "SampleMonitor", "prompts": ["one two"], "sample_steps": 8, "max_new_tokens": 5},
                   {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 8}],
        runner_config__stop_step=8,
    )  # fmt: skip
    assert fit(run_of(config)) == 0
    sampled = capsys.readouterr()
    answers = {}
    for name, more in (("adapter", [("adapter_id", str(tmp_path / "out"))]), ("base", [])):
        given = [("run_mode", "predict"), *more, *([] if more else [("model.model_config.pet_config", "null")])]
        completer = load_completer(load_config(config, given))
        ((answer,),) = completer.complete(["one two"], SamplingParams(max_new_tokens=5))
        answers[name] = answer.text
    assert f"sample: 'one two' -> {answers['adapter']!r}" in sampled.out + sampled.err
    assert answers["base"] != answers["adapter"]


# ---- bad input


def test_a_run_never_takes_the_place_of_its_base(write_config, lora_config, tmp_path, capsys):
    """output_dir left as it was when the base was trained."""
    assert fit(run_of(write_config(runner_config__stop_step=2))) == 0
    folder = tmp_path / "out/checkpoint/rank_0"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for given in (tmp_path / "out", folder / "tiny_rank_0-1_1.safetensors"):
        config = lora_config(load_checkpoint=str(given))
        with pytest.raises(UserError, match=r"output_dir: .*out: .*1_\d\.safetensors.* give another --output_dir"):
            run_of(config)
        assert check(load_config(config)) == 2
        assert re.search(r"PROBLEM +weights +output_dir: .*give another --output_dir", capsys.readouterr().out)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert run_of(config, ("output_dir", str(tmp_path / "lora"))).cursor.step == 0


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"lora_rank": 8}, "lora_rank is 4 there and 8 here"),
        ({"lora_alpha": 32}, "lora_alpha is 8.* there and 32.* here"),
        ({"use_dora": True}, "use_dora is False there and True here"),
        ({"target_modules": "wq|wo"}, "does not fit LoRA of rank 4.*missing: .*wo.*that this model lacks: .*wv"),
    ],
)
def test_an_adapter_of_another_kind_is_named(lora_config, tmp_path, wanted, says):
    assert fit(run_of(lora_config(runner_config__stop_step=1))) == 0
    config = lora_config(model__model_config__pet_config=LORA | wanted)
    with pytest.raises(UserError, match=says):
        loaded_net(config, ("adapter_id", str(tmp_path / "out")))


def test_an_adapter_of_another_base_is_named(lora_config, tmp_path, base):
    assert fit(run_of(lora_config(runner_config__stop_step=1))) == 0
    adapter = ("adapter_id", str(tmp_path / "out"))
    other = _another_base(base, tmp_path)
    with pytest.raises(UserError, match=r"trained on another base, .*base\.safetensors"):
        loaded_net(lora_config(load_checkpoint=str(other)), adapter)
    with pytest.raises(UserError, match=r"does not fit .* of another shape: .*lora_a is \[4, 32\], here \[4, 64\]"):
        loaded_net(lora_config(model__model_config__hidden_size=64), adapter)


def test_the_same_base_is_the_same_whatever_else_is_trained(lora_config, tmp_path, base):
    """freeze_exclude and the kind of the head change what is frozen, not the base; another base is still seen."""
    from llm_core.peft.adapters import load_adapter, load_base, read_adapter
    from llm_core.peft.apply import build_net

    assert fit(run_of(lora_config(runner_config__stop_step=1))) == 0
    other = _another_base(base, tmp_path)
    given = ("adapter_id", str(tmp_path / "out"))
    wider = lora_config(model__model_config__pet_config=LORA | {"freeze_exclude": ["*norm*"]})
    assert fit(run_of(wider, given, ("output_dir", str(tmp_path / "wider")), ("runner_config.stop_step", "1"))) == 0
    for folder in (tmp_path / "out", tmp_path / "wider"):
        spec = replace(_spec(), head="sequence", num_labels=2)
        adapter = read_adapter(folder, spec)
        net = build_net(spec, adapter.pet, seed=1)
        load_base(net, str(base))
        load_adapter(net, adapter)
        load_base(net, str(other))
        with pytest.raises(UserError, match=r"another base, .*1 tensors differ: model\.layers\.0\.attention\.wk"):
            load_adapter(net, adapter)


def test_other_ways_to_be_wrong(lora_config, write_config, tmp_path, base):
    assert fit(run_of(lora_config(runner_config__stop_step=1))) == 0
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"pet_config is set, and there is no adapter: name it with --adapter_id"):
        loaded_net(lora_config())
    with pytest.raises(UserError, match=rf"without its base: give it as --adapter_id {out}, .*base\.safetensors"):
        loaded_net(lora_config(load_checkpoint=out))
    with pytest.raises(UserError, match="there is no adapter in it"):
        loaded_net(lora_config(), ("adapter_id", str(base)))
    with pytest.raises(UserError, match="'query' matches no linear layer of this model"):
        run_of(lora_config(model__model_config__pet_config=LORA | {"target_modules": "query"}))
    with pytest.raises(UserError, match="no parameter is trainable"):
        run_of(lora_config(model__model_config__pet_config=LORA | {"freeze_include": ["*"]}))


def test_check_looks_at_the_adapter_and_counts(lora_config, tmp_path, capsys):
    def lines(*overrides: tuple[str, str]) -> tuple[int, str]:
        code = check(load_config(lora_config(), overrides))
        return code, capsys.readouterr().out

    code, said = lines()
    assert code == 0 and "trainable (" in said and "of the base model's" in said
    assert fit(run_of(lora_config(runner_config__stop_step=1))) == 0
    capsys.readouterr()
    code, said = lines(("run_mode", "eval"), ("adapter_id", str(tmp_path / "out")))
    assert "LoRA of rank 4, alpha 8" in said
    code, said = lines(("run_mode", "predict"))
    assert code == 2 and "there is no adapter" in said
    code, said = lines(("model.model_config.pet_config.target_modules", "nothing"))
    assert code == 2 and "matches no linear layer" in said
