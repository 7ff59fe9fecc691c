"""Meta's own Llama files (params.json, consolidated.NN.pth) as one set of weights under MindFormers' names.

Meta splits each tensor over its files for tensor parallel, and rotates interleaved pairs where MindFormers and
Hugging Face rotate halves: files are concatenated along the split axis, rows of wq and wk are reordered per head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm_core.checkpoint.dtypes import Head
from llm_core.checkpoint.torch_file import TorchFile
from llm_core.errors import UserError

_TOP = {
    "tok_embeddings.weight": "model.tok_embeddings.embedding_weight",
    "norm.weight": "model.norm_out.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(r"layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight")
_SPLIT_ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "lm_head.weight")
_SPLIT_COLUMNS = ("wo.weight", "w2.weight")


def is_meta(files: Sequence[Path]) -> bool:
    """Whether these are Meta's consolidated files."""
    return all(re.fullmatch(r"consolidated\.\d+\.pth", file.name) for file in files)


class MetaLlama:
    """Meta's files of one model opened for reading, as one TensorFile. `heads` has MindFormers' names.

    files: consolidated.*.pth of one folder; one of several stands for all. UserError without params.json beside.
    """

    metadata: dict[str, str] = {}

    def __init__(self, files: Sequence[Path]):
        folder = files[0].parent
        self.path = folder
        self._params = _read_params(folder)
        self._shards = [TorchFile(file) for file in sorted(folder.glob("consolidated.*.pth"))]
        self._stored_names: dict[str, str] = {}
        self.heads: dict[str, Head] = {}
        for stored_name, head in self._shards[0].heads.items():
            if stored_name == "rope.freqs":
                continue
            name = _TOP.get(stored_name) or (f"model.{stored_name}" if _LAYER.fullmatch(stored_name) else stored_name)
            self._stored_names[name] = stored_name
            self.heads[name] = Head(head.dtype, self._merged_shape(name, head.shape))

    def _axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The axis along which the files split `name`; None for what each of them has whole."""
        if name.endswith(_SPLIT_ROWS):
            return 0
        if name.endswith(_SPLIT_COLUMNS):
            return 1
        if name.endswith("embedding_weight"):  # columns in Llama 1 and 2, rows in Llama 3
            return 0 if shape[1] == self._params["dim"] else 1
        return None

    def _merged_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = self._axis(name, shape)
        if axis is None:
            return shape
        return tuple(n * len(self._shards) if i == axis else n for i, n in enumerate(shape))

    def read(self, name: str) -> np.ndarray:
        """The whole tensor `name`, its files concatenated, its heads' rows in MindFormers' order."""
        stored_name = self._stored_names[name]
        axis = self._axis(name, self._shards[0].heads[stored_name].shape)
        if axis is None:
            return self._shards[0].read(stored_name)
        try:
            whole = np.concatenate([shard.read(stored_name) for shard in self._shards], axis=axis)
        except (KeyError, ValueError) as error:
            raise UserError(f"{self.path}: the consolidated files do not fit together at {stored_name}") from error
        if name.endswith("attention.wq.weight"):
            return interleaved_to_halves(whole, self._params["n_heads"])
        if name.endswith("attention.wk.weight"):
            return interleaved_to_halves(whole, self._params.get("n_kv_heads") or self._params["n_heads"])
        return whole

    def verify(self) -> None:
        """Nothing to do ahead: a tensor's crc is checked when it is read."""

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def _read_params(folder: Path) -> dict:
    path = folder / "params.json"
    try:
        params = json.loads(path.read_text())
        if isinstance(params["dim"], int) and isinstance(params["n_heads"], int):
            return params
    except FileNotFoundError:
        raise UserError(f"{path}: missing; Meta ships it beside the .pth files, and the head count is in it") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: damaged: it must hold dim and n_heads")


def interleaved_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * d, n] whose rows rotate in pairs (0,1), (2,3), ... -> the same with pairs (0,d/2), (1,d/2+1), ..."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, columns)
