"""Prefix tuning and p-tuning v2: trained keys and values before every layer's own.

P positions of keys and values for each layer come from one table [P, 2 * layers * kv channels], in the order layer, key
or value, head, channel. Prefix tuning (arXiv 2101.00190) puts the table through an MLP, Dense - Tanh - Dense;
p-tuning v2 (arXiv 2110.07602) takes it as it is, or through such an MLP if asked to. Names are MindFormers', whose
prefix is as wide as the query heads: with grouped heads there is nothing that it would fit.

Here are the plain facts, without MindSpore; the layer itself is in `prefix_encoder`, its use in models/decoder.py and
models/cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_core.errors import UserError
from llm_core.models.spec import DecoderSpec

if TYPE_CHECKING:
    from mindspore import nn

    from llm_core.config.model_section import PrefixTuningConfig, PTuning2Config


@dataclass(frozen=True)
class PrefixFacts:
    """What both kinds of pet_config come to. `middle`: width of the MLP's hidden layer, 0 = no MLP."""

    kind: str  # as in the parameters' names
    length: int
    middle: int
    dropout: float
    length_key: str  # what the pet_config calls the length

    @property
    def table(self) -> str:
        """The name of the table."""
        return f"mindpet_delta_{self.kind}_embedding.embedding_table"

    @property
    def mlp(self) -> str:
        """What the names of the MLP begin with."""
        return f"mindpet_delta_{self.kind}_trans"


def facts(pet: PrefixTuningConfig | PTuning2Config) -> PrefixFacts:
    """Of a pet_config of either kind."""
    if pet.pet_type == "prefixtuning":
        return PrefixFacts("prefixtuning", pet.prefix_token_num, pet.mid_dim, pet.dropout_rate, "prefix_token_num")
    middle = pet.projection_dim if pet.prefix_projection else 0
    return PrefixFacts("ptuning2", pet.pre_seq_len, middle, pet.dropout_prob, "pre_seq_len")


def width(spec: DecoderSpec) -> int:
    """Channels of one position: the keys and values of all layers."""
    return 2 * spec.num_layers * spec.kv_size


def shapes(spec: DecoderSpec, pet: PrefixTuningConfig | PTuning2Config) -> dict[str, tuple[int, ...]]:
    """The adapter's parameters: the table and, where there is an MLP, its two layers.

    Raises UserError for a prefix longer than the model's context.
    """
    found, channels = facts(pet), width(spec)
    if found.length > spec.max_position:
        raise UserError(
            f"pet_config.{found.length_key}: {found.length} trained positions are more than the context of "
            f"{spec.max_position} tokens (model_config.seq_length, or max_position_embedding) that they stand before; "
            "take fewer"
        )
    by_name: dict[str, tuple[int, ...]] = {found.table: (found.length, channels)}
    if found.middle:
        by_name[f"{found.mlp}.0.weight"] = (found.middle, channels)
        by_name[f"{found.mlp}.0.bias"] = (found.middle,)
        by_name[f"{found.mlp}.2.weight"] = (channels, found.middle)
        by_name[f"{found.mlp}.2.bias"] = (channels,)
    return by_name


def attach(net: nn.Cell, spec: DecoderSpec, pet: PrefixTuningConfig | PTuning2Config, seed: int | None) -> None:
    """Give a network of models/heads.py, made for the model `spec`, the prefix that `pet` describes.

    seed: of its initial values, None = zeros, for an adapter about to be loaded. Raises UserError as `shapes`.
    """
    from llm_core.peft.prefix_encoder import PrefixEncoder

    shapes(spec, pet)
    encoder = PrefixEncoder(spec, facts(pet), seed, net.parts.own_kv_heads())
    net.model.set_prefix(encoder, facts(pet).length)
