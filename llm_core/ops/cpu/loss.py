"""The token loss, from logits or from what they are made of."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from llm_core.ops.cpu.custom import bf16_refusal, kernel


class TokenNll(nn.Cell):
    """As the reference's: logits fp32 [N, V], labels int32 [N], negative = ignored -> (fp32 [], fp32 []).

    The gradient is written over the logits, so that they are held once: nothing else may look at them after the loss.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.core = _LogitsNll()

    def construct(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.core(logits, labels)[0].reshape(()), _supervised(labels)


class _LogitsNll(nn.Cell):
    """The loss [1], and log sum exp of each row."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.forward = kernel("cross_entropy_forward", lambda logits, labels: ([1], labels), 2)
        self.backward = kernel("cross_entropy_backward", lambda logits, labels, lse, dloss: [1], in_place=True)

    def construct(self, logits, labels):
        return self.forward(logits, labels)

    def bprop(self, logits, labels, out, dout):
        done = self.backward(logits, labels, out[1], dout[0])
        return ops.depend(logits, done), ops.zeros_like(labels)


class LinearNll(nn.Cell):
    """As the reference's: TokenNll of the logits x weight^T, of which only a few rows exist at a time.

    x fp32 [N, H], weight fp32 [V, H], labels int32 [N] -> (fp32 [], fp32 []). In training (`set_train`) the gradients
    are computed together with the loss, for they need the same logits; otherwise only the loss is. frozen: nobody asks
    for the gradient to weight, which is then none at all.
    """

    def __init__(self, bf16: bool = False, frozen: bool = False):
        super().__init__(auto_prefix=False)
        suffix = "_bf16" if bf16 and not bf16_refusal() else ""
        self.with_gradients = _FrozenLinearNll(suffix) if frozen else _LinearNllWithGradients(suffix)
        self.alone = _LinearNll(suffix)

    def construct(self, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.with_gradients(x, weight, labels)[0] if self.training else self.alone(x, weight, labels)
        return loss.reshape(()), _supervised(labels)


class _LinearNllWithGradients(nn.Cell):
    """The loss [1] and its gradients to x and weight, which the backward pass multiplies in place by the loss's."""

    def __init__(self, suffix: str):
        super().__init__(auto_prefix=False)
        self.forward = kernel(f"linear_cross_entropy{suffix}", lambda x, weight, labels: ([1], x, weight), 3)
        self.scale = kernel("scale_in_place", lambda x, factor: [1], in_place=True)

    def construct(self, x, weight, labels):
        return self.forward(x, weight, labels)

    def bprop(self, x, weight, labels, out, dout):
        return self._scaled(out[1], dout[0]), self._scaled(out[2], dout[0]), ops.zeros_like(labels)

    def _scaled(self, gradient, factor):
        return ops.depend(gradient, self.scale(gradient, factor))


class _FrozenLinearNll(nn.Cell):
    """The loss [1] and its gradient to x; that to weight is zeros, which no graph computes that does not use them."""

    def __init__(self, suffix: str):
        super().__init__(auto_prefix=False)
        self.forward = kernel(f"linear_cross_entropy_frozen{suffix}", lambda x, weight, labels: ([1], x), 2)
        self.scale = kernel("scale_in_place", lambda x, factor: [1], in_place=True)

    def construct(self, x, weight, labels):
        return self.forward(x, weight, labels)

    def bprop(self, x, weight, labels, out, dout):
        dx = ops.depend(out[1], self.scale(out[1], dout[0]))
        return dx, ops.zeros_like(weight), ops.zeros_like(labels)


class _LinearNll(nn.Cell):
    """The loss [1]; should a gradient be asked for after all, everything is computed again."""

    def __init__(self, suffix: str):
        super().__init__(auto_prefix=False)
        self.forward = kernel(f"linear_cross_entropy_forward{suffix}", lambda x, weight, labels: [1])
        self.gradients = kernel(f"linear_cross_entropy{suffix}", lambda x, weight, labels: ([1], x, weight), 3)

    def construct(self, x, weight, labels):
        return self.forward(x, weight, labels)

    def bprop(self, x, weight, labels, out, dout):
        _, dx, dweight = self.gradients(x, weight, labels)
        return dx * dout, dweight * dout, ops.zeros_like(labels)


def _supervised(labels: Tensor) -> Tensor:
    return ops.cast(labels >= 0, ms.float32).sum()
