"""Tiny Llamas that differ in one thing each, their fixed weights, and what this project and HF make of them.

Used by the tests of the model and by tools/make_golden.py; only the functions named hf_* need torch.
"""

from __future__ import annotations

import zlib
from functools import cache
from types import SimpleNamespace

import numpy as np

from llm_core.checkpoint.hf import from_hf
from llm_core.models.spec import DecoderSpec, RopeSpec

BATCH, LENGTH, VOCAB, PROMPT, NEW_TOKENS = 3, 40, 48, 9, 64
TRAINED = 32  # positions; shorter than LENGTH, so that every scaling is beyond its trained length
SAMPLES = 64  # elements of each gradient that a golden file keeps
DEEP = ("mha", "gqa", "tied")  # cases with two layers; the others have one, which compiles faster

_ROPE = {"rope_theta": 100.0, "max_position_embeddings": TRAINED}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
# name -> (what differs in HF's config, what differs in our spec)
CASES: dict[str, tuple[dict, dict]] = {
    "mha": ({"num_key_value_heads": 4}, {"num_kv_heads": 4}),
    "gqa": ({}, {}),
    "tied": ({"tie_word_embeddings": True}, {"tied_head": True}),
    "biases": ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    "wide_heads": ({"head_dim": 12}, {"head_dim": 12}),
    "linear": (
        _ROPE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope": RopeSpec(100.0, "linear", 2.0, TRAINED)},
    ),
    "dynamic_ntk": (
        _ROPE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope": RopeSpec(100.0, "dynamic_ntk", 2.0, TRAINED)},
    ),
    "yarn": (_ROPE | {"rope_scaling": _YARN}, {"rope": RopeSpec(100.0, "yarn", 4.0, TRAINED)}),
    "llama3": (_ROPE | {"rope_scaling": _LLAMA3}, {"rope": RopeSpec(100.0, "llama3", 4.0, TRAINED)}),
}


def spec_of(name: str, **changes) -> DecoderSpec:
    """Our spec of a case."""
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2 if name in DEEP else 1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=40,
        max_position=PROMPT + NEW_TOKENS,
    )
    return DecoderSpec(**(fields | CASES[name][1] | changes))


def fixed_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a parameter: from numpy's frozen generator, five times as large as at a training's start."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return (1 + 0.2 * values if "norm" in name else 0.1 * values).astype(np.float32)


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


@cache
def run(name: str) -> SimpleNamespace:
    """Our model of a case, and its loss, count, gradients by name, logits [B, S, V], greedy [B, NEW_TOKENS]."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    from llm_core.models.cache import CachedDecoder
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

    net = CausalLM(spec_of(name), seed=None)
    fill(net)
    tokens, labels = data()
    step = Step(net)
    loss, count, gradients, logits = step(Tensor(tokens), Tensor(labels))
    by_name = {p.name: g.asnumpy() for p, g in zip(step.weights, gradients, strict=True)}
    decoder = CachedDecoder(net, BATCH, PROMPT + NEW_TOKENS)
    return SimpleNamespace(
        net=net,
        decoder=decoder,
        loss=float(loss),
        count=float(count),
        gradients=by_name,
        logits=logits.asnumpy(),
        greedy=greedy(decoder, tokens[:, :PROMPT], np.zeros(BATCH, np.int32), PROMPT if name in DEEP else 1),
    )


def greedy(decoder, prompt: np.ndarray, kv_start: np.ndarray, width: int = PROMPT) -> np.ndarray:
    """Greedy continuation of a left-padded prompt [B, P], read in pieces of `width`: int32 [B, NEW_TOKENS]."""
    from mindspore import Tensor

    def read(tokens, start):
        return decoder(Tensor(tokens), Tensor(np.int32(start)), Tensor(kv_start)).asnumpy()

    for start in range(0, prompt.shape[1], width):
        logits = read(np.ascontiguousarray(prompt[:, start : start + width]), start)
    out = []
    for position in range(prompt.shape[1], prompt.shape[1] + NEW_TOKENS):
        out.append(logits.argmax(-1).astype(np.int32)[:, None])
        logits = read(out[-1], position)
    return np.concatenate(out, 1)


def hf_model(name: str):
    """HF's model of a case with the fixed weights, fp32, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2 if name in DEEP else 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(LlamaConfig(**(fields | CASES[name][0]))).eval()
    with torch.no_grad():
        for hf_name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(fixed_values(from_hf(hf_name), tuple(parameter.shape))))
    return model


def hf_run(name: str) -> SimpleNamespace:
    """HF's results on a case, with the fields of `run`."""
    import torch

    model = hf_model(name)
    tokens, labels = (torch.from_numpy(array.astype(np.int64)) for array in data())
    logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), reduction="sum")
    loss.backward()
    gradients = {from_hf(n): p.grad.numpy() for n, p in model.named_parameters()}
    return SimpleNamespace(
        loss=float(loss.detach()),
        count=float((labels >= 0).sum()),
        gradients=gradients,
        logits=logits.detach().numpy(),
        greedy=hf_greedy(hf_model(name), tokens[:, :PROMPT], torch.ones(BATCH, PROMPT, dtype=torch.long)),
    )


def hf_greedy(model, prompt, attention_mask) -> np.ndarray:
    """HF's greedy continuation: int64 [B, NEW_TOKENS]."""
    out = model.generate(
        prompt,
        attention_mask=attention_mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, prompt.shape[1] :].numpy()


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
