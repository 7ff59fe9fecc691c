"""One fixed batch, and what a model of ours and one of HF's make of it: shared by the cases of all families.

Used by the tests of the model and by tools/make_golden.py; only the functions named hf_* need torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

BATCH, LENGTH, VOCAB, PROMPT = 3, 40, 48, 9
SAMPLES = 64  # elements of each gradient that a golden file keeps


def fixed_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a parameter: from numpy's frozen generator, five times as large as at a training's start."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    scale = "norm" in name and name.endswith("weight")
    return (1 + 0.2 * values if scale else 0.1 * values).astype(np.float32)


def fill(net) -> None:
    """Give a CausalLM its fixed weights."""
    from mindspore import Tensor

    for name, parameter in net.parameters_dict().items():
        parameter.set_data(Tensor(fixed_values(name, parameter.shape)))


def data() -> tuple[np.ndarray, np.ndarray]:
    """tokens and labels int32 [BATCH, LENGTH]; some labels ignored, one row padded on the right."""
    random = np.random.RandomState(7)
    tokens = random.randint(1, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    labels = random.randint(1, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    labels[0, :5] = -100
    tokens[1, 25:], labels[1, 24:] = 0, -100
    return tokens, labels


def our_results(spec) -> SimpleNamespace:
    """A model of `spec` with the fixed weights, and its loss, count, gradients by name and logits [B, S, V]."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from llm_core.models.decoder import CausalLM
    from llm_core.models.heads import TokenLoss

    class Step(nn.Cell):
        """TokenLoss, its gradients and the logits in one graph, since compiling is what takes the time here."""

        def __init__(self, net):
            super().__init__(auto_prefix=False)
            self.weights = ms.ParameterTuple(net.trainable_params())
            self.net, self.loss = net, TokenLoss(net)
            self.gradient = ops.GradOperation(get_by_list=True, sens_param=True)

        def construct(self, tokens, labels):
            loss, count = self.loss(tokens, labels)
            sens = (ops.ones_like(loss), ops.zeros_like(count))
            gradients = self.gradient(self.loss, self.weights)(tokens, labels, sens)
            return loss, count, gradients, self.net(tokens)

    net = CausalLM(spec, seed=None)
    fill(net)
    tokens, labels = data()
    step = Step(net)
    loss, count, gradients, logits = step(Tensor(tokens), Tensor(labels))
    by_name = {p.name: g.asnumpy() for p, g in zip(step.weights, gradients, strict=True)}
    return SimpleNamespace(
        net=net, loss=float(loss), count=float(count), gradients=by_name, logits=logits.asnumpy()
    )


def hf_results(model, by_our_names: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> SimpleNamespace:
    """HF's results with the fields of `our_results`; `by_our_names` renames (and splits) what HF has by its names."""
    import torch

    tokens, labels = (torch.from_numpy(array.astype(np.int64)) for array in data())
    logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), reduction="sum")
    loss.backward()
    return SimpleNamespace(
        loss=float(loss.detach()),
        count=float((labels >= 0).sum()),
        gradients=by_our_names({name: p.grad.numpy() for name, p in model.named_parameters()}),
        logits=logits.detach().numpy(),
    )


def hf_greedy(model, prompt: np.ndarray, kv_start: np.ndarray, new_tokens: int) -> np.ndarray:
    """HF's greedy continuation of a left-padded prompt int32 [B, P]: int64 [B, new_tokens]."""
    import torch

    mask = np.arange(prompt.shape[1])[None] >= kv_start[:, None]
    out = model.generate(
        torch.from_numpy(prompt.astype(np.int64)),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, prompt.shape[1] :].numpy()


def compare(ours: SimpleNamespace, theirs: SimpleNamespace) -> None:
    """Assert the project's tolerances: logits 1e-5 absolute, loss and every gradient 1e-5 relative."""
    assert np.abs(ours.logits - theirs.logits).max() < 1e-5
    assert abs(ours.loss / theirs.loss - 1) < 1e-5
    assert ours.count == theirs.count
    assert set(ours.gradients) == set(theirs.gradients)
    for parameter, gradient in theirs.gradients.items():
        assert gradient_error(ours.gradients[parameter], gradient) < 1e-5, parameter


def golden_of(name: str, theirs: SimpleNamespace) -> dict[str, np.ndarray]:
    """What a golden file keeps of HF's results on a case, greedy tokens among them."""
    return {
        f"{name}/logits": theirs.logits[:, ::4],
        f"{name}/loss": np.float64(theirs.loss),
        f"{name}/greedy": theirs.greedy.astype(np.uint8),
        f"{name}/gradients": sample(theirs.gradients),
    }


def compare_golden(ours: SimpleNamespace, golden, name: str) -> None:
    """`compare` with a golden file's case."""
    assert np.abs(ours.logits[:, ::4] - golden[f"{name}/logits"]).max() < 1e-5
    assert abs(ours.loss / golden[f"{name}/loss"] - 1) < 1e-5
    rows = zip(sorted(ours.gradients), sample(ours.gradients), golden[f"{name}/gradients"], strict=True)
    for parameter, a, b in rows:
        assert gradient_error(a, b) < 1e-5, parameter


def sample(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """What a golden file keeps of the gradients: fp32 [parameters, SAMPLES], by name, evenly spaced elements."""
    rows = []
    for _, gradient in sorted(gradients.items()):
        flat = gradient.reshape(-1)
        rows.append(np.resize(flat[:: max(1, flat.size // SAMPLES)], SAMPLES))
    return np.stack(rows)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))


def gradient_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """`relative`, or the norm of ours where theirs is zero but for rounding.

    Without rotary positions the bias of the keys moves all scores of a query alike: its gradient is zero.
    """
    return relative(ours, theirs) if np.linalg.norm(theirs) > 1e-5 else float(np.linalg.norm(ours))
