"""Classification heads against Hugging Face: logits, losses, gradients; and a base model's weights in a classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from decoder_runs import VOCAB, fixed_values, gradient_error

from llm_core.checkpoint.hf import from_hf, parts_of_fused
from llm_core.checkpoint.hf_fused import HfView, QkvLayout
from llm_core.checkpoint.weights import load_into
from llm_core.errors import UserError
from llm_core.models.heads import build_model, head_is_fresh, training_loss
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec, spec_from_config

LENGTHS = (12, 7, 9)  # of the rows, padded on the right
CLASSES = 3
_OLD = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}
_LLAMA = {"intermediate_size": 40, "rms_norm_eps": 1e-5}
# name -> (family, head, keys of the config that ours and HF's share)
CASES = {
    "llama_sequence": ("Llama", "SequenceClassification", _LLAMA),
    "llama_token": ("Llama", "TokenClassification", _LLAMA),
    "llama_question": ("Llama", "QuestionAnswering", _LLAMA),
    "internlm_sequence": ("InternLM", "SequenceClassification", _LLAMA),
    "falcon_sequence": ("Falcon", "SequenceClassification", _OLD | {"alibi": True, "bias": True}),
    "falcon_token": ("Falcon", "TokenClassification", {"multi_query": True, "parallel_attn": True}),
    "falcon_question": ("Falcon", "QuestionAnswering", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


def spec_of(name: str) -> DecoderSpec:
    from llm_core.config import model_section

    family, head, keys = CASES[name]
    section = getattr(model_section, f"{family}Config")
    config = section(
        type=f"{family}Config", seq_length=16, vocab_size=VOCAB, hidden_size=32, num_layers=1, num_heads=4,
        num_labels=CLASSES, compute_dtype="float32", **keys,
    )  # fmt: skip
    return spec_from_config(SimpleNamespace(arch=SimpleNamespace(type=f"{family}For{head}"), config=config))


def hf_model(name: str):
    """HF's model of a case with the fixed weights, its names made by the project's own map."""
    import torch
    import transformers

    family, head, keys = CASES[name]
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_labels=CLASSES)
    sizes["pad_token_id"] = 0 if head == "SequenceClassification" else None  # it gets no gradient there
    if family == "Falcon":
        config = transformers.FalconConfig(**sizes, **keys, attn_implementation="sdpa")
    else:
        config = transformers.LlamaConfig(**sizes, **keys, attention_bias=family == "InternLM")
    model = getattr(transformers, f"{'Falcon' if family == 'Falcon' else 'Llama'}For{head}")(config).eval()
    spec = spec_of(name)
    theirs = hf_view(name, {key: fixed_values(key, shape) for key, shape in parameter_shapes(spec).items()})
    model.load_state_dict({key: torch.from_numpy(np.ascontiguousarray(theirs[key])) for key in theirs})
    return model


def hf_view(name: str, ours: dict[str, np.ndarray]) -> HfView:
    spec = spec_of(name)
    layout = QkvLayout(spec.num_kv_heads, spec.head_dim)
    return HfView(ours, CASES[name][0].lower(), layout, two_norms=spec.residual == "parallel_two_norms")


def data(head: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """tokens int32 [3, 12], our labels, and what HF is given instead of them."""
    random = np.random.RandomState(3)
    tokens = random.randint(1, VOCAB, (3, 12)).astype(np.int32)
    labels = np.full_like(tokens, -100)
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = 0
    if head == "sequence":
        classes = np.array([2, 0, 1])
        labels[np.arange(3), np.array(LENGTHS) - 1] = classes
        return tokens, labels, {"labels": classes}
    if head == "token":
        for row, length in enumerate(LENGTHS):
            labels[row, 1:length] = random.randint(0, CLASSES, length - 1)
        return tokens, labels, {"labels": labels.astype(np.int64)}
    starts, ends = np.array([1, 3, 4]), np.array([1, 6, 5])  # the first answer is one token
    labels[np.arange(3), starts - 1], labels[np.arange(3), ends] = 0, 1
    return tokens, labels, {"start_positions": starts, "end_positions": ends}


def our_results(name: str):
    """Loss, count, gradients by name, and logits as HF gives them."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    class Step(nn.Cell):
        def __init__(self, net):
            super().__init__(auto_prefix=False)
            self.weights = ms.ParameterTuple(net.trainable_params())
            self.net, self.loss = net, training_loss(net)
            self.gradient = ops.GradOperation(get_by_list=True, sens_param=True)

        def construct(self, tokens, labels, last):
            loss, count = self.loss(tokens, labels)
            sens = (ops.ones_like(loss), ops.zeros_like(count))
            gradients = self.gradient(self.loss, self.weights)(tokens, labels, sens)
            logits = self.net(tokens, last) if self.net.spec.head == "sequence" else self.net(tokens)
            return loss, count, gradients, logits

    spec = spec_of(name)
    net = build_model(spec, seed=None)
    for key, parameter in net.parameters_dict().items():
        parameter.set_data(Tensor(fixed_values(key, parameter.shape)))
    tokens, labels, _ = data(spec.head)
    step = Step(net)
    last = Tensor(np.array(LENGTHS, np.int32) - 1)
    loss, count, gradients, logits = step(Tensor(tokens), Tensor(labels), last)
    by_name = {p.name: g.asnumpy() for p, g in zip(step.weights, gradients, strict=True)}
    return float(loss), float(count), by_name, logits.asnumpy()


@pytest.mark.parametrize("name", CASES)
def test_as_hugging_face(name):
    torch = pytest.importorskip("torch")
    loss, count, gradients, logits = our_results(name)
    head = spec_of(name).head
    tokens, labels, targets = data(head)
    assert count == (labels >= 0).sum()

    model = hf_model(name)
    # all places take part in the loss of question answering, padding too, which a mask would show other keys
    mask = np.ones_like(tokens) if head == "question" else tokens > 0
    out = model(
        torch.from_numpy(tokens.astype(np.int64)), attention_mask=torch.from_numpy(mask.astype(np.int64)),
        **{key: torch.from_numpy(value) for key, value in targets.items()},
    )  # fmt: skip
    theirs = out.loss * count  # HF's is the mean; of question answering the mean of both ends
    theirs.backward()
    assert abs(loss / float(theirs.detach()) - 1) < 1e-5

    expected = torch.stack([out.start_logits, out.end_logits], -1) if head == "question" else out.logits
    expected, real = expected.detach().numpy(), slice(None)
    if head != "sequence":
        real = tokens > 0
    assert np.abs(logits[real] - expected[real]).max() < 1e-5

    view = hf_view(name, gradients)
    found = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    assert set(view) == set(found)
    for key, gradient in found.items():
        assert gradient_error(view[key], gradient) < 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_names_come_back(name):
    """What `HfView` names, `from_hf` and `parts_of_fused` name back."""
    ours = {key: np.zeros(shape, np.float32) for key, shape in parameter_shapes(spec_of(name)).items()}
    back = [ours_of for key in hf_view(name, ours) for ours_of in parts_of_fused(key) or [from_hf(key)]]
    assert sorted(back) == sorted(ours)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted(name):
    spec = spec_of(name)
    shapes = {key: tuple(parameter.shape) for key, parameter in build_model(spec, seed=1).parameters_dict().items()}
    assert shapes == parameter_shapes(spec)
    assert spec.num_parameters == sum(int(np.prod(shape)) for shape in shapes.values())


def base_weights(spec: DecoderSpec) -> dict[str, np.ndarray]:
    return {key: fixed_values(key, shape) for key, shape in parameter_shapes(replace(spec, head="causal")).items()}


def test_a_base_model_becomes_a_classifier():
    spec = spec_of("llama_sequence")
    net = build_model(spec, seed=None)
    report = load_into(net, base_weights(spec))
    assert report.missing == ["score.weight"] and report.unexpected == ["lm_head.weight"]
    assert "the classifier's head, which starts fresh" in report.line()
    assert head_is_fresh(net) and net.score.weight.asnumpy().std() > 0
    first = net.model.layers[0].attention.wq.weight
    assert np.array_equal(first.asnumpy(), fixed_values(first.name, first.shape))


def test_a_trained_head_is_not_fresh():
    spec = spec_of("llama_token")
    net = build_model(spec, seed=None)
    load_into(net, {key: fixed_values(key, shape) for key, shape in parameter_shapes(spec).items()})
    assert not head_is_fresh(net)


def test_a_classifier_misses_no_other_weight():
    spec = spec_of("llama_sequence")
    weights = base_weights(spec)
    del weights["model.norm_out.weight"]
    with pytest.raises(UserError, match="1 of the model's .* not in it: model.norm_out.weight"):
        load_into(build_model(spec, seed=None), weights)


def test_the_base_is_the_same_whatever_the_head():
    """A parameter's start depends on its own name alone."""
    spec = spec_of("falcon_sequence")
    classifier, causal = (build_model(each, seed=5).parameters_dict() for each in (spec, replace(spec, head="causal")))
    shared = classifier.keys() & causal.keys()
    assert len(shared) == len(classifier) - 1
    for name in shared:
        assert np.array_equal(classifier[name].asnumpy(), causal[name].asnumpy())


@pytest.mark.parametrize("name", ["falcon_token", "llama_sequence", "llama_question"])
def test_a_hugging_face_folder_and_back(tmp_path, name):
    """A converted classifier is one for transformers too, with the same logits; and its folder loads here."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from mindspore import Tensor
    from safetensors.numpy import save_file

    from llm_core.checkpoint.convert import to_hugging_face
    from llm_core.checkpoint.weights import open_weights
    from llm_core.config import load_config

    family, head, keys = CASES[name]
    spec = spec_of(name)
    sizes = dict(
        type=f"{family}Config", seq_length=16, vocab_size=VOCAB, hidden_size=32, num_layers=1, num_heads=4,
        num_labels=CLASSES, compute_dtype="float32", **keys,
    )  # fmt: skip
    model = {"arch": {"type": f"{family}For{head}"}, "model_config": sizes}
    (tmp_path / "run.yaml").write_text(json.dumps({"run_mode": "eval", "model": model}))
    weights = {key: fixed_values(key, shape) for key, shape in parameter_shapes(spec).items()}
    save_file(weights, tmp_path / "model.safetensors")
    folder = to_hugging_face(tmp_path / "model.safetensors", tmp_path / "hf", config=tmp_path / "run.yaml")

    theirs = getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder).eval()
    tokens = np.random.RandomState(2).randint(1, VOCAB, (1, 10))
    out = theirs(torch.from_numpy(tokens))
    expected = torch.stack([out.start_logits, out.end_logits], -1) if head == "QuestionAnswering" else out.logits

    loaded = load_config(tmp_path / "run.yaml", [("load_checkpoint", str(folder))])
    assert spec_from_config(loaded.config.model).num_labels == (2 if head == "QuestionAnswering" else CLASSES)
    net = build_model(spec_from_config(loaded.config.model), seed=None)
    report = load_into(net, open_weights(folder))
    assert not report.missing and not report.unexpected
    ids = Tensor(tokens.astype(np.int32))
    logits = net(ids, Tensor(np.array([9], np.int32))) if spec.head == "sequence" else net(ids)
    assert np.abs(logits.asnumpy() - expected.detach().numpy()).max() < 1e-5
