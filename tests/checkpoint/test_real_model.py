"""Weights of a Hugging Face folder in the real decoder compute what transformers computes."""

import numpy as np
import pytest

from llm_core.checkpoint.weights import compare, load_into, open_weights
from llm_core.models.spec import DecoderSpec

SIZES = {"vocab_size": 64, "hidden_size": 32}
HF_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
OUR_SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 48, "max_position": 64}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({}, {"qkv_concat": True}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True, "qkv_concat": True}),
    ],
    ids=["split", "joined", "tied", "bias", "joined-bias"],
)
def test_a_hugging_face_folder_in_the_decoder(tmp_path, theirs, ours):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import mindspore as ms

    from llm_core.models.decoder import CausalLM

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HF_SIZES, **theirs, rms_norm_eps=1e-5)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    net = CausalLM(DecoderSpec(**SIZES, **OUR_SIZES, **ours, norm_eps=1e-5), seed=0)
    weights = open_weights(tmp_path)
    shapes = {name: tuple(parameter.shape) for name, parameter in net.parameters_dict().items()}
    report = load_into(net, weights, source=tmp_path)
    assert report == compare(weights, shapes)
    assert (report.missing, report.unexpected) == ([], []) and len(report.matched) == len(shapes)
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    expected = model(torch.from_numpy(tokens).long()).logits.detach().numpy()
    np.testing.assert_allclose(net(ms.Tensor(tokens)).asnumpy(), expected, atol=1e-5)
