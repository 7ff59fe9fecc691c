"""Every shipped run, shrunk to a model of a few thousand parameters, starts and comes to its end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_core.config import catalog, load_config
from llm_core.config.tree import find, plain

SEQ_LENGTH, VOCAB, RECORDS = 16, 512, 4
SIZES = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "seq_length": SEQ_LENGTH, "vocab_size": VOCAB}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
KV_HEADS = {"LlamaConfig": "n_kv_heads", "InternLMConfig": "n_kv_heads", "FalconConfig": "num_kv_heads"}


@pytest.fixture(scope="session")
def tiny_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with one label each, on the last token: the class 0 or 1 for a classifier, any token for the others."""
    from llm_core.data.records import RecordWriter

    rows = np.random.default_rng(1).integers(3, VOCAB, (RECORDS, SEQ_LENGTH + 1)).astype(np.int32)
    labels = np.full_like(rows, -100)
    labels[:, -1] = np.arange(RECORDS) % 2
    path = tmp_path_factory.mktemp("tiny") / "tiny.mindrecord"
    with RecordWriter(path, columns={"input_ids": SEQ_LENGTH + 1, "labels": SEQ_LENGTH + 1}, manifest={}) as writer:
        writer.write_rows({"input_ids": rows, "labels": labels})
    return path


def shrunk(name: str, records: Path, tokenizer: Path, folder: Path) -> list[tuple[str, object]]:
    """Overrides that make a shipped run one of seconds; what makes it that run (family, layout, adapter) stays."""
    tree = load_config(name).tree
    model = plain(find(tree, "model.model_config"))
    changes: dict[str, object] = {f"model.model_config.{key}": value for key, value in (SIZES | IDS).items()}
    if model.get(KV_HEADS[model["type"]]):
        changes[f"model.model_config.{KV_HEADS[model['type']]}"] = 2
    for key in ("intermediate_size", "ffn_hidden_size", "max_position_embedding"):
        if model.get(key):
            changes[f"model.model_config.{key}"] = 64
    for key in {"prefix_token_num", "pre_seq_len", "mid_dim"} & set(model.get("pet_config") or {}):
        changes[f"model.model_config.pet_config.{key}"] = 2
    changes |= {
        "use_parallel": False, "output_dir": str(folder / "out"), "context.device_target": "CPU",
        "processor.tokenizer.vocab_file": str(tokenizer), "model.model_config.max_new_tokens": 2,
        "model.model_config.compute_dtype": "float32", "load_checkpoint": "",
        "train_dataset.data_loader.dataset_dir": str(records), "eval_dataset.data_loader.dataset_dir": str(records),
    }  # fmt: skip
    if plain(find(tree, "run_mode")) in ("train", "finetune"):
        changes |= {"runner_config.epochs": 1, "runner_config.batch_size": 2}
    else:
        changes |= {"predict_data": ["Hello"], "model.model_config.seq_length": 64}  # InternLM wraps prompts
    return list(changes.items())


def save_weights(given: list[tuple[str, object]], name: str, path: Path) -> None:
    """The shrunk model's initial weights."""
    from safetensors.numpy import save_file

    from llm_core.models.shapes import parameter_shapes
    from llm_core.models.spec import spec_from_config

    shapes = parameter_shapes(spec_from_config(load_config(name, given).config.model))
    rng = np.random.default_rng(0)
    save_file({key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", catalog.names())
def test_a_shipped_run_runs(name: str, tiny_records: Path, spm_model: Path, tmp_path: Path) -> None:
    from llm_core.infer.run import predict
    from llm_core.train.run import train

    given = shrunk(name, tiny_records, spm_model, tmp_path)
    mode = plain(find(load_config(name).tree, "run_mode"))
    if mode != "train":
        save_weights(given, name, tmp_path / "base.safetensors")
        given.append(("load_checkpoint", str(tmp_path / "base.safetensors")))
    loaded = load_config(name, given)
    loaded.require_runnable()
    start = {"train": train, "finetune": train, "predict": predict}[mode]
    assert start(loaded) == 0
    result = "text_generation_result.txt" if mode == "predict" else "metrics.jsonl"
    assert (tmp_path / "out" / result).stat().st_size
