"""Neither converting nor transforming holds more than a few tensors: counted by tracemalloc, which sees numpy's."""

import json
import tracemalloc

import numpy as np
import pytest
from checkpoint_samples import hf_names, write
from layout_samples import parts

from llm_core.checkpoint.convert import to_hugging_face, to_mindformers
from llm_core.checkpoint.reshard import Share
from llm_core.checkpoint.transform import LayoutTarget, OneFile, transform
from llm_core.checkpoint.weights import open_weights
from llm_core.models.shapes import parameter_shapes
from llm_core.models.spec import DecoderSpec
from llm_core.parallel.cuts import cut_parameters
from llm_core.parallel.layout import Layout

SPEC = DecoderSpec(512, 256, 12, 4, 4, 64, 512, 64)
SHAPES = parameter_shapes(SPEC)
WHOLE = sum(int(np.prod(shape)) for shape in SHAPES.values()) * 4  # bytes: 32 MB; the largest tensor has 0.5 MB
CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def peak():
    """peak(function, ...) -> the most bytes that were allocated at a time while it ran."""

    def measure(function, *arguments, **settings):
        tracemalloc.start()
        try:
            function(*arguments, **settings)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    return measure


def tensors():
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def test_sharded_folders_are_converted_a_tensor_at_a_time(tmp_path, peak):
    (tmp_path / "hf").mkdir()
    index, files = {}, {}
    for number, (name, array) in enumerate(hf_names(tensors()).items()):
        file = f"model-{number % 3 + 1:05d}-of-00003.safetensors"
        index[name] = file
        files.setdefault(file, {})[name] = array
    for file, held in files.items():
        write(tmp_path / "hf" / file, held)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG))
    del files, held, array
    ours = tmp_path / "ours.safetensors"
    assert peak(to_mindformers, tmp_path / "hf", ours, "bf16") < WHOLE / 3
    assert peak(to_hugging_face, ours, tmp_path / "back", max_shard_size=5 * 10**6) < WHOLE / 3
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2


def test_layouts_are_transformed_a_part_at_a_time(tmp_path, peak):
    def target(layout):
        cuts = cut_parameters(SPEC, layout)
        return LayoutTarget([Share(layout, rank, cuts) for rank in range(layout.world)])

    write(tmp_path / "one.ckpt", tensors())
    source = open_weights(tmp_path / "one.ckpt")
    assert peak(transform, source, target(Layout(dp=2, tp=2, zero=3)), tmp_path / "a") < WHOLE / 3
    source.close()
    source = open_weights(tmp_path / "a")
    assert peak(transform, source, target(Layout(tp=4)), tmp_path / "b") < WHOLE / 3
    assert peak(transform, source, OneFile(), tmp_path / "c") < WHOLE / 3
    source.close()
    weights = open_weights(tmp_path / "b" / "rank_3")
    share = target(Layout(tp=4)).shares[3]
    assert peak(lambda: parts(dict(weights), share)) > WHOLE  # the measure sees what is held at once
    weights.close()
