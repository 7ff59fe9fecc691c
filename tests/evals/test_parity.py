"""Perplexity of a Hugging Face folder, given as it is, against Hugging Face's own loss on the same tokens."""

import json

import numpy as np
import pytest

from llm_core.config import load_config
from llm_core.data.records import RecordWriter
from llm_core.evals.run import evaluate

pytestmark = pytest.mark.parity

RUN = """
run_mode: eval
runner_config: {batch_size: 4}
context: {device_target: CPU}
model: {arch: {type: LlamaForCausalLM}, model_config: {type: LlamaConfig, pad_token_id: -1}}
eval_dataset: {data_loader: {dataset_dir: ''}}
"""


def test_loss_is_that_of_hugging_face(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.4,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    ids = np.random.default_rng(1).integers(0, 80, (10, 24)).astype(np.int32)
    with RecordWriter(tmp_path / "text.mindrecord", columns={"input_ids": 24}) as writer:
        writer.write_rows({"input_ids": ids})
    (tmp_path / "run.yaml").write_text(RUN)
    given = {
        "load_checkpoint": str(tmp_path / "hf"),
        "output_dir": str(tmp_path / "out"),
        "eval_dataset.data_loader.dataset_dir": str(tmp_path / "text.mindrecord"),
    }
    assert evaluate(load_config(tmp_path / "run.yaml", list(given.items()))) == 0

    with torch.no_grad():
        tokens = torch.from_numpy(ids).long()
        expected = model(tokens, labels=tokens).loss.item()
    measured = json.loads((tmp_path / "out" / "eval_result.json").read_text())["PerplexityMetric"]
    assert measured["tokens"] == 230
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["PPL"] == pytest.approx(np.exp(expected), rel=1e-4)
