"""The trained prefix as a Cell: from its parameters to keys and values for every layer."""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn, ops

from llm_core import ops as core_ops
from llm_core.models.layers import Linear, initial_normal
from llm_core.models.spec import DecoderSpec
from llm_core.peft.prefix import PrefixFacts, width


class PrefixEncoder(nn.Cell):
    """Dropout key (int32 [2], or None: no dropout) -> a pair (keys, values) for every layer, each fp32 [P, Hkv, D].

    All is computed in float32. Dropout is applied to what comes out, one mask for all rows of a batch.

    The table starts as normal(0, 1) before an MLP, whose first layer keeps that deviation and whose second has the
    model's own (initializer_range); without an MLP the table itself has the model's. Positions differ from the start.

    own: the key/value heads that are wanted of it.
    """

    def __init__(self, spec: DecoderSpec, facts: PrefixFacts, seed: int | None, own: slice = slice(None)):
        super().__init__(auto_prefix=False)
        self.shape = (facts.length, spec.num_kv_heads, spec.head_dim)
        self.layers, self.kv_size = spec.num_layers, spec.kv_size
        channels, std = width(spec), spec.initializer_range
        table_std = 1.0 if facts.middle else std
        table = initial_normal(facts.table, (facts.length, channels), table_std, seed)
        self.table = Parameter(Tensor(table), name=facts.table)
        self.first, self.end, _ = own.indices(spec.num_kv_heads)
        self.projects = facts.middle > 0
        if self.projects:
            self.inner = Linear(f"{facts.mlp}.0", channels, facts.middle, True, channels**-0.5, seed)
            self.tanh = ops.Tanh()
            self.outer = Linear(f"{facts.mlp}.2", facts.middle, channels, True, std, seed)
        # Places 0 .. 3 * layers - 1 are the decoder's own.
        self.drop = core_ops.Dropout(facts.dropout, 3 * spec.num_layers) if facts.dropout else None

    def construct(self, key: Tensor | None) -> tuple[tuple[Tensor, Tensor], ...]:
        x = self.table
        if self.projects:
            x = self.outer(self.tanh(self.inner(x)))
        if self.drop is not None and key is not None:
            x = self.drop(x, key)
        parts = ops.split(x, self.kv_size, -1)
        pairs = ()
        for i in range(self.layers):
            pairs = pairs + ((self._own(parts[2 * i]), self._own(parts[2 * i + 1])),)
        return pairs

    def _own(self, x: Tensor) -> Tensor:
        """[P, kv channels] -> [P, own heads, D]."""
        return x.reshape(self.shape)[:, self.first : self.end]
