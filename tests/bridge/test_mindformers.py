"""The bridge to MindFormers, with MindFormers 1.9.0 as the oracle: checkpoints both ways, logits, lr, metrics, runs.

`make mindformers` makes an environment that has it, and runs these tests there; elsewhere they are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("mindformers") is None:
    pytest.skip("mindformers is not installed (make mindformers)", allow_module_level=True)

ROOT = Path(__file__).parents[2]
_PLACE = tempfile.mkdtemp()  # what its import writes goes into the working folder by default
os.environ |= {"LOCAL_DEFAULT_PATH": _PLACE, "OM_MODULES_CACHE": f"{_PLACE}/modules"}
os.environ["REGISTER_PATH"] = str(ROOT / "llm_core" / "bridge")

import mindspore as ms  # noqa: E402
from mindformers.core import lr as their_lr  # noqa: E402
from mindformers.core.metric.metric import EmF1Metric, PerplexityMetric  # noqa: E402
from mindformers.models.build_model import build_network  # noqa: E402
from mindformers.models.llama import LlamaConfig, LlamaForCausalLM  # noqa: E402
from mindformers.tools.register import MindFormerConfig  # noqa: E402

from llm_core.checkpoint.ckpt_file import ckpt_size, write_ckpt  # noqa: E402
from llm_core.checkpoint.dtypes import head_of  # noqa: E402
from llm_core.checkpoint.files import file_size, write_tensors  # noqa: E402
from llm_core.checkpoint.staged import StagedFile  # noqa: E402
from llm_core.checkpoint.weights import load_into, open_weights  # noqa: E402
from llm_core.data.records import RecordWriter  # noqa: E402
from llm_core.evals.perplexity import summarize  # noqa: E402
from llm_core.evals.squad import cmrc_scores, first_line  # noqa: E402
from llm_core.models.decoder import CausalLM  # noqa: E402
from llm_core.models.spec import DecoderSpec  # noqa: E402
from llm_core.train.schedule import build_schedule  # noqa: E402

KEYS = dict(
    type="LlamaConfig", batch_size=2, seq_length=16, hidden_size=32, num_layers=2, num_heads=4, n_kv_heads=2,
    vocab_size=64, multiple_of=8, rms_norm_eps=1e-5, pad_token_id=0, compute_dtype="float32",
    layernorm_compute_type="float32", softmax_compute_type="float32", rotary_dtype="float32",
    param_init_type="float32", use_past=False, use_flash_attention=False,
    use_rope_slice=True, fused_rms_norm=False,  # without these two MindFormers' Llama does not run on a CPU
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "biases": {"qkv_has_bias": True, "attn_proj_has_bias": True},
    "tied": {"tie_word_embeddings": True},
    "longer": {"extend_method": "PI", "scaling_factor": 2.0, "max_position_embedding": 16},
}


@pytest.fixture(autouse=True, scope="module")
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", max_call_depth=10000)


def network(family: str, model_config: dict):
    name = f"{family}ForCausalLM"
    arch = {"type": name, "auto_register": f"mindformers_models.{name}"}
    return build_network(MindFormerConfig(arch=arch, model_config=model_config))


def theirs(**keys):
    """MindFormers' own network: its class itself, since ours takes its name in the registry."""
    return LlamaForCausalLM(LlamaConfig(**{name: value for name, value in (KEYS | keys).items() if name != "type"}))


def ours(**keys):
    """Our network, as MindFormers builds it from the `model` section of a YAML."""
    return network("Llama", KEYS | keys)


def randomize(net) -> None:
    rng = np.random.default_rng(0)
    for parameter in net.get_parameters():
        values = rng.normal(1.0 if "norm" in parameter.name else 0.0, 0.2, parameter.shape)
        parameter.set_data(ms.Tensor(values.astype(np.float32)))


def tokens(padded: bool = False) -> ms.Tensor:
    ids = np.random.default_rng(1).integers(1, 64, (2, 17))
    if padded:
        ids[0, 11:] = 0
    return ms.Tensor(ids, ms.int32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints_and_numbers_agree(tmp_path, variant):
    """Ours saved, loaded there with nothing missing; then the same logits and the same loss."""
    our_net, their_net = ours(**VARIANTS[variant]), theirs(**VARIANTS[variant])
    randomize(our_net)
    assert not isinstance(our_net, LlamaForCausalLM)
    for suffix in (".ckpt", ".safetensors"):
        arrays = {p.name: p.asnumpy() for p in our_net.get_parameters()}
        heads = {name: head_of(array) for name, array in arrays.items()}
        path = tmp_path / f"ours{suffix}"
        with StagedFile(path, file_size(suffix, heads, {"format": "ms"})) as staged:
            write_tensors(staged, heads, arrays.__getitem__, {"format": "ms"})
            staged.commit()
        loaded = ms.load_checkpoint(str(path), format=suffix[1:])
        assert ms.load_param_into_net(their_net, loaded) == ([], [])
    for net in (our_net, their_net):
        net.set_train(False)
    ids = tokens()[:, :16]
    (logits, shown, mask), (expected, their_ids, their_mask) = our_net(ids), their_net(ids)
    np.testing.assert_allclose(logits.asnumpy(), expected.asnumpy(), atol=1e-5)
    np.testing.assert_array_equal(shown.asnumpy(), their_ids.asnumpy())
    np.testing.assert_array_equal(mask.asnumpy(), their_mask.asnumpy())
    for net in (our_net, their_net):
        net.set_train(True)
    ids = tokens(padded=True)
    loss, expected = float(our_net(ids).asnumpy()), float(their_net(ids).asnumpy()[0])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_their_checkpoint_loads_here(tmp_path):
    net = theirs()
    randomize(net)
    ms.save_checkpoint(net, str(tmp_path / "theirs.ckpt"))
    spec = DecoderSpec(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=88,
        max_position=16,
    )  # fmt: skip
    here = CausalLM(spec, seed=None)
    report = load_into(here, open_weights(tmp_path / "theirs.ckpt"))
    assert (report.missing, report.unexpected) == ([], [])
    net.set_train(False)
    ids = tokens()[:, :16]
    np.testing.assert_allclose(here(ids).asnumpy(), net(ids)[0].asnumpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["InternLM", "Falcon"])
def test_families_that_mindformers_lacks(family):
    keys = {key: KEYS[key] for key in ("hidden_size", "num_layers", "num_heads", "vocab_size", "seq_length")}
    own = {"type": f"{family}Config", "auto_register": f"mindformers_models.{family}Config", "pad_token_id": 0}
    net = network(family, keys | own | {"compute_dtype": "float32"})
    names = {parameter.name for parameter in net.get_parameters()}
    assert ("model.layers.0.attention.wq.bias" in names) == (family == "InternLM")
    net.set_train(True)
    assert float(net(tokens()).asnumpy()) == pytest.approx(np.log(64), rel=0.05)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_past": True}, "predict with run_llm.py"),
        ({"qkv_concat": True}, "joins projections head by head"),
        ({"num_heads": 5}, "hidden_size 32 is no multiple"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(Exception, match=message):
        ours(**keys)


RATE = {"learning_rate": 1e-3}
SCHEDULES = [
    ("ConstantWarmUpLR", RATE | {"warmup_steps": 7, "total_steps": 50}),
    ("LinearWithWarmUpLR", RATE | {"warmup_steps": 7, "total_steps": 50}),
    ("CosineWithWarmUpLR", RATE | {"warmup_ratio": 0.1, "total_steps": 50, "lr_end": 1e-4}),
    ("CosineWithWarmUpLR", RATE | {"warmup_steps": 5, "warmup_lr_init": 1e-5, "total_steps": 50, "num_cycles": 0.4}),
    ("CosineWithRestartsAndWarmUpLR", RATE | {"warmup_steps": 5, "total_steps": 50, "num_cycles": 3.0}),
    ("PolynomialWithWarmUpLR", RATE | {"warmup_steps": 0, "total_steps": 50, "power": 2.0, "lr_end": 1e-7}),
    ("CosineAnnealingLR", {"base_lr": 1e-3, "t_max": 20, "eta_min": 1e-5}),
    ("CosineAnnealingWarmRestarts", {"base_lr": 1e-3, "t_0": 6, "t_mult": 2, "eta_min": 1e-5}),
]


@pytest.mark.parametrize(("name", "keys"), SCHEDULES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SCHEDULES)])
def test_learning_rates_agree(name, keys):
    expected = getattr(their_lr, name)(**keys)
    schedule = build_schedule(SimpleNamespace(type=name, **keys), None, total_steps=50, steps_per_epoch=10)
    for step in range(55):
        value = float(expected(ms.Tensor(step, ms.int32)).asnumpy())
        assert schedule(step) == pytest.approx(value, rel=2e-5, abs=1e-9), step


def test_perplexity_agrees():
    rng = np.random.default_rng(2)
    metric, sums = PerplexityMetric(), []
    metric.clear()
    for length in (16, 9):
        logits = rng.normal(0, 1, (2, 16, 64)).astype(np.float32)
        ids = rng.integers(1, 64, (2, 16)).astype(np.int32)
        mask = (np.arange(16) < length).astype(np.float32)[None].repeat(2, 0)
        metric.update(ms.Tensor(logits), ms.Tensor(ids), ms.Tensor(mask))
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1)[..., 0]
        kept = mask[:, 1:] if _masks_labels(metric) else mask[:, :-1]
        sums.append((float((nll * kept).sum()), float(kept.sum())))
    expected, result = metric.eval(), summarize(sums)
    assert result.per_batch_loss == pytest.approx(expected["loss"], rel=1e-5)
    assert result.per_batch_ppl == pytest.approx(expected["PPL"], rel=1e-5)


def _masks_labels(metric) -> bool:
    """Whether MindFormers' cell takes the mask at the label's place rather than at the token's."""
    ids, mask = np.ones((1, 4), np.int32), np.array([[1, 1, 1, 0]], np.float32)
    logits = np.zeros((1, 4, 8), np.float32)
    logits[0, 2] = 9 * np.eye(8)[1]  # the last label is certain
    loss = float(metric.ppl_loss(ms.Tensor(logits), ms.Tensor(ids), ms.Tensor(mask)).asnumpy())
    return loss == pytest.approx(np.log(8), rel=1e-4)


def test_exact_match_and_f1_agree():
    predictions = ["The cat", "in 1999.\nand more", "东京 is big", "", "a b c", "Denver Broncos!"]
    golds = ["the cat.", "1999", "东京", "nothing", "a x c", "denver broncos"]
    metric = EmF1Metric()
    metric.clear()
    metric.update(list(predictions), list(golds))
    expected = metric.eval()
    scores = cmrc_scores([first_line(each) for each in predictions], [[gold] for gold in golds])
    assert (scores.f1, scores.em) == (pytest.approx(expected["F1"]), pytest.approx(expected["Em"]))


# ---- whole runs

_STEP = re.compile(r"loss:\s*\[?([\d.]+).*?lr: ([\d.e+-]+)")


def filled_in(folder: Path, name: str, auto_register: bool = False, wrapper: bool = False) -> Path:
    text = (Path(__file__).parent / "run.yaml").read_text()
    files = {"OUTPUT": name, "START": "start.ckpt", "DATA": "t.mindrecord"}
    for word, value in files.items():
        text = text.replace(f": {word}\n", f": {folder / value}\n")
    step = "TrainOneStepOnCPU\n  auto_register: mindformers_models.TrainOneStepOnCPU"
    text = text.replace("type: WRAPPER", f"type: {step if wrapper else 'MFTrainOneStepCell'}")
    if auto_register:
        text += "    auto_register: mindformers_models.LlamaForCausalLM\n"
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def steps_of(*command, folder: Path) -> list[tuple[float, float]]:
    """(loss, lr) of every step that a run logs."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = [line for line in done.stdout.splitlines() if "{ Epoch:" in line]
    return [tuple(map(float, _STEP.search(line).groups())) for line in lines]


@pytest.mark.slow
def test_runs_agree_step_by_step(tmp_path):
    """One YAML: MindFormers with its network, MindFormers with ours, and run_llm.py."""
    start = CausalLM(DecoderSpec(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=88,
        max_position=16,
    ), seed=1)  # fmt: skip
    arrays = {p.name: p.asnumpy() for p in start.get_parameters()}
    heads = {name: head_of(array) for name, array in arrays.items()}
    with StagedFile(tmp_path / "start.ckpt", ckpt_size(heads)) as staged:
        write_ckpt(staged, heads, arrays.__getitem__)
        staged.finish()
        staged.commit()
    ids = np.random.default_rng(0).integers(3, 64, (16, 17)).astype(np.int32)
    ids[3, 10:] = 0
    with RecordWriter(tmp_path / "t.mindrecord", columns={"input_ids": 17}, manifest={}) as writer:
        writer.write_rows({"input_ids": ids})
    script, bridge = Path(__file__).parent / "their_run.py", ROOT / "llm_core" / "bridge"
    expected = steps_of(script, filled_in(tmp_path, "theirs", wrapper=True), bridge, folder=tmp_path)
    assert len(expected) == 16
    bridged = steps_of(script, filled_in(tmp_path, "bridged", True, wrapper=True), bridge, folder=tmp_path)
    steps_of(ROOT / "run_llm.py", "--config", filled_in(tmp_path, "here"), folder=tmp_path)
    lines = map(json.loads, (tmp_path / "here" / "metrics.jsonl").read_text().splitlines())  # more digits than the log
    here = [(line["loss"], line["lr"]) for line in lines]
    for run in (bridged, here):
        np.testing.assert_allclose([lr for _, lr in run], [lr for _, lr in expected], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose([loss for loss, _ in run], [loss for loss, _ in expected], atol=2e-4)
