"""PyTorch's files: the same bits as torch reads, and nothing in them is executed."""

import collections
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from llm_core.checkpoint.files import open_tensor_file
from llm_core.checkpoint.meta_llama import interleaved_to_halves
from llm_core.checkpoint.weights import read_weights
from llm_core.errors import UserError


def archive(path, content: bytes, **entries: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        for name, data in entries.items():
            file.writestr(f"archive/{name}", data)


class Command:
    """What a hostile file holds: unpickled plainly, it runs a command."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (lambda marker: {"w": Command(os.system, f"touch {marker}")}, "posix.system"),
        (lambda marker: {"w": Command(eval, f"open({str(marker)!r}, 'w')")}, r"builtin\w*\.eval"),
        (lambda marker: {"w": Command(os.mkdir, str(marker))}, "posix.mkdir"),
        (lambda marker: {"w": Command(getattr, str(marker), "upper")}, r"builtin\w*\.getattr"),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_code_in_a_file_is_refused_by_name(tmp_path, payload, named, suffix):
    marker = tmp_path / "it-ran"
    path = tmp_path / f"pytorch_model{suffix}"
    for protocol in (2, 4):
        archive(path, pickle.dumps(payload(marker), protocol=protocol))
        with pytest.raises(UserError, match=rf"{path.name}.*{named}"):
            read_weights(path)
        assert not marker.exists()


def test_a_bare_pickle_under_any_weight_name_is_refused(tmp_path):
    marker = tmp_path / "it-ran"
    hostile = pickle.dumps({"w": Command(os.system, f"touch {marker}")})
    for name in ("a.bin", "a.pth", "a.ckpt", "a.safetensors"):
        (tmp_path / name).write_bytes(hostile)
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)
    assert not marker.exists()


def test_what_is_no_state_dict(tmp_path):
    path = tmp_path / "a.bin"
    for content in ([1, 2], {}, {"w": 3}, {"state": {"w": 1}}, collections.OrderedDict(x="y")):
        archive(path, pickle.dumps(content))
        with pytest.raises(UserError, match=r"a\.bin"):
            read_weights(path)


torch_only = pytest.mark.parity


def save(torch, path, tensors):
    torch.save({name: tensor for name, tensor in tensors.items()}, path)


@torch_only
def test_every_type_and_layout_has_torchs_bits(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(6, 8)
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {name: (base.abs() * 9).to(getattr(torch, name)) for name in names}
    tensors |= {
        "columns": base[:, 2:5],
        "transposed": base.t(),
        "strided": base[::2, ::3],
        "expanded": base[:, :1].expand(6, 8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
    }
    for content in (tensors, torch.nn.Linear(3, 4).state_dict()):
        save(torch, tmp_path / "a.bin", content)
        file = open_tensor_file(tmp_path / "a.bin")
        assert list(file.heads) == list(content)
        for name, tensor in content.items():
            wide = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
            np.testing.assert_array_equal(file.read(name), wide.numpy(), err_msg=name)
            assert file.heads[name].shape == tuple(tensor.shape)


@torch_only
def test_the_old_form_and_a_damaged_file(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.bin"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="weights_only=True"):
        read_weights(path)
    torch.save({"w": torch.arange(4000.0)}, path)
    whole = bytearray(path.read_bytes())
    position = whole.find(np.float32(2000).tobytes())
    flipped = whole.copy()
    flipped[position] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"a\.bin.*damaged"):
        read_weights(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.bin"):
        read_weights(path)
    buffer = io.BytesIO()
    torch.save({"model": torch.ones(2), "optimizer": {"lr": 1.0}}, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="'optimizer'"):
        read_weights(path)


@torch_only
def test_a_tensor_beyond_its_storage(tmp_path):
    torch = pytest.importorskip("torch")
    path, forged = tmp_path / "a.bin", tmp_path / "b.bin"
    torch.save({"w": torch.ones(4, 4)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(forged, "w") as target:
        for entry in source.namelist():
            data = source.read(entry)
            if entry.endswith("data.pkl"):  # the shape (4, 4) becomes (4, 9)
                assert data.count(b"K\x04K\x04\x86") == 1
                data = data.replace(b"K\x04K\x04\x86", b"K\x04K\x09\x86")
            target.writestr(entry, data)
    with pytest.raises(UserError, match="beyond its storage"):
        read_weights(forged)


def meta_weights(torch, dim=16, ffn=24, vocab=32, heads=4, kv_heads=2, layers=2):
    kv = dim // heads * kv_heads
    shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    for i in range(layers):
        for leaf, shape in {
            "attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim),
            "attention.wo": (dim, dim), "feed_forward.w1": (ffn, dim), "feed_forward.w2": (dim, ffn),
            "feed_forward.w3": (ffn, dim), "attention_norm": (dim,), "ffn_norm": (dim,),
        }.items():  # fmt: skip
            shapes[f"layers.{i}.{leaf}.weight"] = shape
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}


def split(tensor, name, parts, embedding_axis):
    if tensor.dim() == 1:
        return [tensor] * parts
    axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    if name.startswith("tok_embeddings"):
        axis = embedding_axis
    return [piece.clone() for piece in tensor.chunk(parts, dim=axis)]


@torch_only
@pytest.mark.parametrize(("parts", "embedding_axis"), [(1, 0), (2, 0), (2, 1), (4, 1)])
def test_metas_files(tmp_path, parts, embedding_axis):
    """wq and wk must come out as transformers' own conversion script orders them."""
    torch = pytest.importorskip("torch")
    weights = meta_weights(torch)
    for part in range(parts):
        content = {name: split(tensor, name, parts, embedding_axis)[part] for name, tensor in weights.items()}
        torch.save(content | {"rope.freqs": torch.ones(2)}, tmp_path / f"consolidated.{part:02d}.pth")
    with pytest.raises(UserError, match=r"params\.json"):
        read_weights(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({"dim": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2}))
    back = read_weights(tmp_path)
    assert len(back) == len(weights)

    def permuted(tensor, heads):
        rows, columns = tensor.shape
        return tensor.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    q, k = weights["layers.1.attention.wq.weight"], weights["layers.1.attention.wk.weight"]
    expected = {
        "model.tok_embeddings.embedding_weight": weights["tok_embeddings.weight"],
        "model.norm_out.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
        "model.layers.1.attention.wq.weight": permuted(q, 4),
        "model.layers.1.attention.wk.weight": permuted(k, 2),
        "model.layers.1.attention.wo.weight": weights["layers.1.attention.wo.weight"],
        "model.layers.0.feed_forward.w2.weight": weights["layers.0.feed_forward.w2.weight"],
        "model.layers.0.ffn_norm.weight": weights["layers.0.ffn_norm.weight"],
    }
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor.float().numpy(), err_msg=name)


def test_the_permutation_keeps_the_attention_scores():
    """Rotating pairs (2i, 2i+1) before it is rotating pairs (i, i + d/2) after it."""
    rng = np.random.default_rng(0)
    heads, size, width = 2, 8, 16
    weight, x = rng.standard_normal((heads * size, width)), rng.standard_normal((5, width))
    angle = np.arange(5)[:, None] * 100.0 ** -(np.arange(size // 2) / (size // 2))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def scores(rotated):
        return np.einsum("ihd,jhd->hij", rotated, rotated)

    pairs = (x @ weight.T).reshape(5, heads, size // 2, 2)
    interleaved = np.stack((pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin), -1)
    halves = (x @ interleaved_to_halves(weight, heads).T).reshape(5, heads, 2, size // 2)
    first, second = halves[:, :, 0], halves[:, :, 1]
    rotated = np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)
    np.testing.assert_allclose(scores(rotated), scores(interleaved.reshape(5, heads, size)), rtol=1e-12)
