"""Names and shapes of a model's parameters from its spec alone: no MindSpore, nothing allocated.

For looking at a checkpoint before a model is built. A test holds it against the model itself.
"""

from __future__ import annotations

from llm_core.models.spec import DecoderSpec


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """MindFormers' parameter names -> shapes, of the sequential family (Llama, InternLM), in the model's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden = spec.hidden_size
    shapes["model.tok_embeddings.embedding_weight"] = (spec.vocab_size, hidden)
    for index in range(spec.num_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.attention_norm.weight"] = (hidden,)
        for name, (rows, columns, bias) in _linears(spec).items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        shapes[f"{layer}.ffn_norm.weight"] = (hidden,)
    shapes["model.norm_out.weight"] = (hidden,)
    if not spec.tied_head:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def _linears(spec: DecoderSpec) -> dict[str, tuple[int, int, bool]]:
    """The linear layers of one block: name -> (output width, input width, bias)."""
    hidden, q, kv, ffn = spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_size
    if spec.qkv_concat:
        qkv = {"attention.w_qkv": (q + 2 * kv, hidden, spec.qkv_bias)}
        gate_up = {"feed_forward.w_gate_hidden": (2 * ffn, hidden, spec.mlp_bias)}
    else:
        qkv = {
            "attention.wq": (q, hidden, spec.qkv_bias),
            "attention.wk": (kv, hidden, spec.qkv_bias),
            "attention.wv": (kv, hidden, spec.qkv_bias),
        }
        gate_up = {
            "feed_forward.w1": (ffn, hidden, spec.mlp_bias),
            "feed_forward.w3": (ffn, hidden, spec.mlp_bias),
        }
    output = {"attention.wo": (hidden, q, spec.output_bias)}
    down = {"feed_forward.w2": (hidden, ffn, spec.mlp_bias)}
    return {**qkv, **output, **gate_up, **down}
