"""Names and shapes of a model's parameters from its spec alone: no MindSpore, nothing allocated.

For looking at a checkpoint before a model is built. A test holds it against the model itself.
"""

from __future__ import annotations

from llm_core.models.spec import HEAD_NAMES, DecoderSpec


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """MindFormers' parameter names -> shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden = spec.hidden_size
    shapes["model.tok_embeddings.embedding_weight"] = (spec.vocab_size, hidden)
    for index in range(spec.num_layers):
        layer = f"model.layers.{index}"
        shapes.update(_norm(f"{layer}.attention_norm", spec))
        for name, (rows, columns, bias) in _linears(spec).items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        if spec.residual != "parallel":
            shapes.update(_norm(f"{layer}.ffn_norm", spec))
    shapes.update(_norm("model.norm_out", spec))
    shapes.update(_head(spec))
    return shapes


def _head(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """The parameters of the head, none where it is the embedding."""
    if spec.head == "causal" and spec.tied_head:
        return {}
    name, rows = HEAD_NAMES[spec.head], spec.vocab_size if spec.head == "causal" else spec.num_labels
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, spec.hidden_size)}
    if spec.head_has_bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def _norm(name: str, spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """The parameters of one norm."""
    shapes = {f"{name}.weight": (spec.hidden_size,)}
    if spec.norm == "layer":
        shapes[f"{name}.bias"] = (spec.hidden_size,)
    return shapes


def _linears(spec: DecoderSpec) -> dict[str, tuple[int, int, bool]]:
    """The linear layers of one block: name -> (output width, input width, bias)."""
    hidden, q, kv, ffn = spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_size
    if spec.qkv_concat:
        attention = {"attention.w_qkv": (q + 2 * kv, hidden, spec.qkv_bias)}
    else:
        rows = {"attention.wq": q, "attention.wk": kv, "attention.wv": kv}
        attention = {name: (size, hidden, spec.qkv_bias) for name, size in rows.items()}
    if spec.mlp == "gelu":
        rows = {"feed_forward.w1": ffn}
    elif spec.qkv_concat:
        rows = {"feed_forward.w_gate_hidden": 2 * ffn}
    else:
        rows = {"feed_forward.w1": ffn, "feed_forward.w3": ffn}
    up = {name: (size, hidden, spec.mlp_bias) for name, size in rows.items()}
    output = {"attention.wo": (hidden, q, spec.output_bias)}
    down = {"feed_forward.w2": (hidden, ffn, spec.mlp_bias)}
    return {**attention, **output, **up, **down}
