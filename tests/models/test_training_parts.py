"""Initial values, dropout in the model, recomputation, layers from a factory: what training adds to the model."""

from __future__ import annotations

from types import SimpleNamespace

import falcon_cases
import llama_cases
import numpy as np
import pytest
from decoder_runs import data, fill

from llm_core import ops as core_ops

SPEC = llama_cases.spec_of("gqa", num_layers=1)


@pytest.fixture(scope="module")
def step():
    """(spec, prepare=...) -> a function of the dropout key that returns loss and gradients as numpy."""
    import mindspore as ms
    from mindspore import Tensor, nn

    from llm_core.models.decoder import CausalLM
    from llm_core.models.heads import TokenLoss

    class Step(nn.Cell):
        def __init__(self, net):
            super().__init__(auto_prefix=False)
            weights = ms.ParameterTuple(net.trainable_params())
            self.run = ms.value_and_grad(TokenLoss(net), None, weights, has_aux=True)

        def construct(self, *inputs):
            return self.run(*inputs)

    def make(spec, prepare=lambda net: None):
        net = CausalLM(spec, seed=None)
        fill(net)
        prepare(net)
        cell = Step(net)
        inputs = [Tensor(array) for array in data()]

        def call(key=None):
            (loss, _), gradients = cell(*inputs, *([] if key is None else [Tensor(key)]))
            return float(loss), [g.asnumpy() for g in gradients]

        return call

    return make


@pytest.fixture(scope="module")
def plain(step):
    """Loss and gradients of SPEC without dropout or recomputation."""
    return step(SPEC)()


def test_initial_values_depend_on_seed_and_name_alone():
    from llm_core.models.decoder import CausalLM

    def values(spec, seed):
        return {name: p.asnumpy() for name, p in CausalLM(spec, seed=seed).parameters_dict().items()}

    one, two = values(SPEC, 0), values(llama_cases.spec_of("gqa"), 0)
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])
    name = "model.layers.0.feed_forward.w1.weight"
    assert one[name].std() == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(one[name], one["model.layers.0.feed_forward.w3.weight"])
    assert not np.array_equal(one[name], values(SPEC, 1)[name])
    np.testing.assert_allclose(one[name].ravel()[:2], [-0.019124277, 0.021307921], rtol=1e-6)  # on any machine


def test_parameter_names_survive_wrapping():
    from llm_core.models.cache import CachedDecoder
    from llm_core.models.decoder import CausalLM
    from llm_core.models.heads import TokenLoss

    net = CausalLM(SPEC)
    names = list(net.parameters_dict())
    assert names[0] == "model.tok_embeddings.embedding_weight"
    assert list(TokenLoss(net).parameters_dict()) == names
    assert [p.name for p in CachedDecoder(net, 1, 8).trainable_params()] == names


def test_dropout_depends_on_its_key_alone(step, plain):
    spec = llama_cases.spec_of("gqa", num_layers=1, hidden_dropout=0.2, attention_dropout=0.2)
    dropped, again = step(spec), step(spec)
    key = core_ops.dropout_key(seed=1, step=7, micro_batch=0)
    loss, gradients = dropped(key)
    loss_again, gradients_again = again(key)
    assert loss == loss_again
    for a, b in zip(gradients, gradients_again, strict=True):
        np.testing.assert_array_equal(a, b)
    for other in ((2, 7, 0), (1, 8, 0), (1, 7, 1)):
        assert dropped(core_ops.dropout_key(*other))[0] != loss
    # no key, no dropout; a kernel that knows none gives way to the reference, which rounds differently
    assert dropped()[0] == pytest.approx(plain[0], rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [dict(recompute=True, select_recompute=False), dict(recompute=False, select_recompute=True)],
    ids=["whole", "select"],
)
def test_recompute_changes_no_number(step, plain, config):
    check_recompute(step, SPEC, plain, config)


@pytest.mark.parametrize("name", ["7b", "40b_alibi"])
def test_recompute_changes_no_number_of_a_falcon(step, name):
    spec = falcon_cases.spec_of(name)
    whole = name == "7b"
    check_recompute(step, spec, step(spec)(), dict(recompute=whole, select_recompute=not whole))


def check_recompute(step, spec, plain, config):
    """`spec` under this recompute_config has the loss and gradients `plain`."""
    from llm_core.models.recompute import apply_recompute

    marked = []
    loss, gradients = step(spec, lambda net: marked.append(apply_recompute(net, SimpleNamespace(**config))))()
    assert marked == [1]
    assert loss == plain[0]
    for a, b in zip(gradients, plain[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_layers_come_from_the_parts():
    from llm_core.models.decoder import CausalLM
    from llm_core.models.layers import Parts

    asked = []

    class Noting(Parts):
        def linear(self, name, in_size, out_size, *rest):
            asked.append((name, in_size, out_size))
            return super().linear(name, in_size, out_size, *rest)

    CausalLM(SPEC, Noting())
    prefix = "model.layers.0."
    assert asked == [
        (prefix + "attention.wq", 32, 32),
        (prefix + "attention.wk", 32, 16),
        (prefix + "attention.wv", 32, 16),
        (prefix + "attention.wo", 32, 32),
        (prefix + "feed_forward.w1", 32, 40),
        (prefix + "feed_forward.w3", 32, 40),
        (prefix + "feed_forward.w2", 40, 32),
        ("lm_head", 32, 48),
    ]
