"""Tiny runs of every layout, family and way of tuning, and what one process makes of the same records."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

SEQ_LENGTH, VOCAB, RECORDS = 16, 96, 84
RECORDS_A_STEP, STEPS = 8, 20  # 84 records: every epoch's last window is half a window
SCRIPT = Path(__file__).with_name("many_runs.py")
RUN_SECONDS = 90  # that a launch may take for each of its runs, however busy the machine

FAMILIES = {
    "llama": ("LlamaForCausalLM", {"type": "LlamaConfig", "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 48}),
    "falcon": (
        "FalconForCausalLM",
        {"type": "FalconConfig", "num_heads": 4, "alibi": True, "bias": True, "parallel_attn": False,
         "multi_query": False, "ffn_hidden_size": 48, "tie_word_embeddings": True},
    ),
    "falcon40": (
        "FalconForCausalLM",
        {"type": "FalconConfig", "num_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2,
         "ffn_hidden_size": 48, "tie_word_embeddings": True},
    ),
}  # fmt: skip
TUNINGS = {
    "full": None,
    "lora": {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_b_init": "normal",
             "target_modules": "wq|wk|wv|wo|w1|w2|w3"},
    "late": {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_b_init": "normal",
             "target_modules": "wq|wv", "exclude_layers": r"model.layers.[0-1]\."},  # the first stage learns nothing
    "prefix": {"pet_type": "prefixtuning", "prefix_token_num": 4, "mid_dim": 8, "dropout_rate": 0.0},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run: sizes of the layout, and how it shares out what it holds. family, tuning: see above."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    chunks: int = 1
    rows: bool = False  # sequence parallel norms, and an embedding that is cut
    family: str = "llama"
    tuning: str = "full"

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def name(self) -> str:
        sizes = [f"{axis}{size}" for axis, size in (("dp", self.dp), ("tp", self.tp), ("pp", self.pp)) if size > 1]
        more = [f"zero{self.zero}"] * (self.zero > 0) + ["rows"] * self.rows + ["chunks"] * (self.chunks > 1)
        return "-".join(["x".join(sizes) or "one", *more, self.family, self.tuning])

    @property
    def has_alibi(self) -> bool:
        return FAMILIES[self.family][1].get("alibi", False)

    def plain(self) -> Case:
        """The run of one process that it has to equal."""
        return Case(family=self.family, tuning=self.tuning)

    def write(self, folder: Path, records: Path) -> list[str]:
        """Its YAML in `folder`; returns the command line."""
        arch, sizes = FAMILIES[self.family]
        windows = RECORDS_A_STEP // 2 // self.dp  # micro-batches of 2 records
        batch, accumulation, micro = (2, 1, windows) if self.pp > 1 else (2, windows, 1)
        model = {
            "seq_length": SEQ_LENGTH, "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 4, "pad_token_id": 0,
            "compute_dtype": "float32", "param_init_type": "float32", "softmax_compute_type": "float32",
            "rotary_dtype": "float32", "initializer_range": 0.1, "pp_interleave_num": self.chunks, **sizes,
        }  # fmt: skip
        if TUNINGS[self.tuning] is not None:
            model["pet_config"] = TUNINGS[self.tuning]
        config = {
            "seed": 3,
            "run_mode": "train",
            "output_dir": str(folder / self.name),
            "use_parallel": self.world > 1,
            "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "tiny"},
            "runner_config": {"epochs": 2, "batch_size": batch, "sink_mode": False, "stop_step": STEPS,
                              "gradient_accumulation_steps": accumulation},
            "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1},
            "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 0.003, "warmup_steps": 2, "lr_end": 0.001},
            "train_dataset": {
                "data_loader": {"type": "MindDataset", "dataset_dir": str(records), "shuffle": True},
                "input_columns": ["input_ids", "labels"], "drop_remainder": False,
            },
            "runner_wrapper": {"type": "MFTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True},
            "callbacks": [{"type": "MFLossMonitor"},
                          {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 1000}],
            "context": {"mode": 0, "device_target": "CPU"},
            "parallel": {"zero_stage": self.zero, "parallel_optimizer_config": {"parallel_optimizer_threshold": 0}},
            "parallel_config": {
                "data_parallel": self.dp, "model_parallel": self.tp, "pipeline_stage": self.pp,
                "micro_batch_num": micro, "use_seq_parallel": self.rows, "vocab_emb_dp": not self.rows,
            },
            "model": {"arch": {"type": arch}, "model_config": model},
        }  # fmt: skip
        path = folder / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["--config", str(path)]


LAYOUTS = [
    *(Case(dp=2, zero=zero) for zero in range(4)),
    *(Case(dp=4, zero=zero) for zero in range(4)),
    Case(tp=2), Case(tp=2, rows=True), Case(tp=4), Case(pp=2), Case(pp=4), Case(pp=2, chunks=2), Case(tp=2, pp=2),
    *(Case(dp=2, tp=2, zero=zero) for zero in range(4)),
    *(Case(dp=2, pp=2, zero=zero) for zero in range(4)),
]  # fmt: skip


def with_model(layouts: Iterable[Case], *models: tuple[str, str]) -> list[Case]:
    """Each layout with each of the (family, tuning)."""
    return [
        Case(**{**vars(layout), "family": family, "tuning": tuning})
        for layout, (family, tuning) in itertools.product(layouts, models)
    ]


MATRIX = with_model(LAYOUTS, *itertools.product(("llama", "falcon"), ("full", "lora", "prefix")))

# Of the matrix what has parts that nothing else here has: in two launches, see test_layouts.
COVERING = [
    Case(dp=2), Case(dp=2, zero=1, tuning="lora"), Case(dp=2, zero=2, family="falcon"), Case(dp=2, zero=3),
    Case(tp=2, tuning="prefix"), Case(tp=2, rows=True, tuning="lora"), Case(tp=2, rows=True, family="falcon40"),
    Case(pp=2, tuning="prefix"), Case(pp=2, family="falcon"), Case(pp=2, chunks=2),
    Case(tp=4), Case(pp=4, tuning="late"), Case(dp=2, tp=2, zero=3, family="falcon40"), Case(tp=2, pp=2),
    Case(dp=2, pp=2, zero=2), Case(dp=4, zero=1, family="falcon", tuning="lora"),
]  # fmt: skip


def write_records(folder: Path) -> Path:
    """84 records of a repeating pattern, some with padding, one without any supervised token."""
    from llm_core.data.records import RecordWriter

    rng = np.random.default_rng(7)
    rows = (np.arange(SEQ_LENGTH + 1)[None] * 5 + rng.integers(0, 16, (RECORDS, 1))) % 17 + 3
    rows[40] = rng.integers(60, VOCAB, SEQ_LENGTH + 1)
    labels = rows.copy()
    for number in range(0, RECORDS, 3):
        keep = int(rng.integers(0, SEQ_LENGTH)) if number else 0
        rows[number, keep + 1 :] = 0
        labels[number, keep + 1 :] = -100
    path = folder / "tiny.mindrecord"
    with RecordWriter(path, columns={"input_ids": SEQ_LENGTH + 1, "labels": SEQ_LENGTH + 1}, manifest={}) as writer:
        writer.write_rows({"input_ids": rows.astype(np.int32), "labels": labels.astype(np.int32)})
    return path


def launch(folder: Path, world: int, commands: list[list[str]]) -> list[list[int]]:
    """Run the command lines one after the other on `world` ranks of one launch; exit codes by rank and command."""
    jobs = folder / f"jobs_{world}.json"
    jobs.write_text(json.dumps(commands))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # msrun starts "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOG_v": "3", "PATH": path}
    if world == 1:
        command = [sys.executable, str(SCRIPT), str(jobs)]
    else:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={world}",
            f"--local_worker_num={world}", f"--master_port={port}", "--join=True", f"--log_dir={folder / 'log'}",
            str(SCRIPT), str(jobs),
        ]  # fmt: skip
    seconds = 300 + RUN_SECONDS * len(commands)
    ended = subprocess.run(
        command, cwd=folder, env=environment, timeout=seconds, capture_output=True, text=True, check=False
    )
    codes = [jobs.with_name(f"{jobs.name}.rank_{rank}") for rank in range(world)]
    assert all(path.exists() for path in codes), ended.stdout[-3000:] + ended.stderr[-3000:]
    return [json.loads(path.read_text()) for path in codes]


def losses(folder: Path, case: Case) -> np.ndarray:
    """Loss and gradient norm of every step: [steps, 2]."""
    lines = [json.loads(line) for line in (folder / case.name / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["loss"], line["global_norm"]] for line in lines if "loss" in line])


def held_elements(folder: Path, case: Case, rank: int) -> tuple[int, int]:
    """What the rank's own checkpoint holds: elements of parameters, and of the optimizer's state."""
    from llm_core.checkpoint.files import open_tensor_file

    (path,) = (folder / case.name / "checkpoint" / f"rank_{rank}").glob("*.safetensors")
    file = open_tensor_file(path)
    counts = {name: int(np.prod(head.shape)) for name, head in file.heads.items()}
    file.close()
    state = sum(count for name, count in counts.items() if name.startswith("adam_"))
    return sum(counts.values()) - state, state


def final_weights(folder: Path, case: Case) -> dict[str, np.ndarray]:
    """What the last checkpoint holds of the model, put together from all ranks."""
    from llm_core.checkpoint.weights import read_weights

    return read_weights(folder / case.name)
