"""Weight files hold exactly what was given, and the packages that own the formats agree."""

import json
import random

import numpy as np
import pytest

from llm_core.checkpoint.dtypes import BY_NAME, Head, bfloat16_bits, bfloat16_values, head_of
from llm_core.checkpoint.files import file_size, open_tensor_file, read_heads, write_tensors
from llm_core.checkpoint.staged import StagedFile
from llm_core.errors import UserError


def some_tensors():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((6, 8)).astype(np.float32)
    return {
        "model.whole": base,
        "model.columns": base[:, 1:4],
        "model.transposed": base.T,
        "model.strided": base[::2, ::3],
        "model.half": base.astype(np.float16),
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "step": np.array([3, -4], np.int64),
        "flags": np.array([True, False, True]),
        "bytes": np.arange(5, dtype=np.uint8),
    }


def write(path, tensors, heads=None, metadata=None):
    heads = heads or {name: head_of(array) for name, array in tensors.items()}
    with StagedFile(path, 0) as staged:
        write_tensors(staged, heads, tensors.__getitem__, metadata or {})
        staged.commit()
    return heads


def read(path):
    file = open_tensor_file(path)
    file.verify()
    tensors = {name: file.read(name) for name in file.heads}
    file.close()
    return tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_values_survive_whatever_their_layout_in_memory(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    tensors = some_tensors()
    heads = write(path, tensors)
    back = read(path)
    assert path.stat().st_size == file_size(suffix, heads, {})
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape, name
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert read_heads(path) == heads


def test_the_safetensors_package_reads_ours_and_we_its(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = some_tensors()
    write(tmp_path / "ours.safetensors", tensors, metadata={"format": "ms"})
    theirs = safetensors.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(theirs[name], array, err_msg=name)
    plain = {name: np.ascontiguousarray(array) for name, array in tensors.items() if array.ndim}
    safetensors.save_file(plain, tmp_path / "t.safetensors")
    back = read(tmp_path / "t.safetensors")
    assert back.keys() == plain.keys()
    for name in back:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)


def test_mindspore_reads_our_ckpt_and_we_its(tmp_path):
    import mindspore as ms

    tensors = {name: array for name, array in some_tensors().items() if array.size}
    bf16 = np.array([1.0, -2.5, 3.140625], np.float32)
    heads = {name: head_of(array) for name, array in tensors.items()}
    heads["bf16"] = Head(BY_NAME["bfloat16"], (3,))
    write(tmp_path / "ours.ckpt", {**tensors, "bf16": bf16}, heads)
    theirs = ms.load_checkpoint(str(tmp_path / "ours.ckpt"), crc_check=True)
    for name, array in tensors.items():
        np.testing.assert_array_equal(theirs[name].asnumpy(), array, err_msg=name)
    assert theirs["bf16"].dtype == ms.bfloat16
    np.testing.assert_array_equal(theirs["bf16"].float().asnumpy(), bf16)

    items = [{"name": name, "data": ms.Tensor(np.array(array))} for name, array in tensors.items()]
    items.append({"name": "bf16", "data": ms.Tensor(bf16, dtype=ms.bfloat16)})
    for crc in (False, True):
        ms.save_checkpoint(items, str(tmp_path / f"theirs{crc}.ckpt"), crc_check=crc, append_dict={"note": "text"})
        back = read(tmp_path / f"theirs{crc}.ckpt")
        for name, array in {**tensors, "bf16": bf16}.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_a_tensor_in_several_pieces(tmp_path, monkeypatch):
    import mindspore as ms

    monkeypatch.setattr("llm_core.checkpoint.ckpt_file._PIECE_BYTES", 64)
    array = np.arange(100, dtype=np.float32).reshape(10, 10)
    heads = write(tmp_path / "a.ckpt", {"w": array, "v": array[0]})
    assert (tmp_path / "a.ckpt").stat().st_size == file_size(".ckpt", heads, {})
    np.testing.assert_array_equal(read(tmp_path / "a.ckpt")["w"], array)
    np.testing.assert_array_equal(ms.load_checkpoint(str(tmp_path / "a.ckpt"))["w"].asnumpy(), array)


def test_mindspore_bfloat16_arrays_are_stored_as_bfloat16(tmp_path):
    import mindspore as ms

    array = ms.Tensor(np.array([[1.0, 0.1], [-7.0, 1e30]], np.float32), dtype=ms.bfloat16).asnumpy()
    heads = write(tmp_path / "a.safetensors", {"w": array.T})
    assert heads["w"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors")["w"], array.T.astype(np.float32))


def hard_values():
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0x3F80, 0x3FA0, dtype=np.uint32) << 16) | 0x8000
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 65504.0, 65519.9, 2**-25], np.float32)
    return np.concatenate([bits.view(np.float32), ties.view(np.float32), edges])


@pytest.mark.parity
def test_rounding_is_torchs():
    torch = pytest.importorskip("torch")
    values = hard_values()
    ours = bfloat16_values(bfloat16_bits(values))
    theirs = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(ours, theirs)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    np.testing.assert_array_equal(half, torch.from_numpy(values).to(torch.float16).numpy())


def test_bfloat16_rounds_ties_to_even_and_keeps_nan():
    def rounded(bits):
        return int(bfloat16_bits(np.array([bits], np.uint32).view(np.float32))[0])

    assert rounded(0x3F808000) == 0x3F80 and rounded(0x3F818000) == 0x3F82
    assert rounded(0x3F808001) == 0x3F81 and rounded(0x3F807FFF) == 0x3F80
    assert np.isnan(bfloat16_values(bfloat16_bits(np.array([0x7F800001], np.uint32).view(np.float32))))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_truncated_file_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write(path, some_tensors())
    whole = path.read_bytes()
    for keep in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=path.name):
            read(path)


def test_a_flipped_bit_of_a_ckpt_is_found_by_its_crc(tmp_path):
    path = tmp_path / "a.ckpt"
    array = np.ones(1000, np.float32)
    write(path, {"w": array})
    data = bytearray(path.read_bytes())
    data[2000] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.ckpt.*damaged"):
        read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin"])
def test_random_bytes_are_refused_without_a_traceback(tmp_path, suffix):
    rng = np.random.default_rng(2)
    path = tmp_path / f"a{suffix}"
    for size in (0, 1, 17, 100, 5000):
        for _ in range(20):
            path.write_bytes(rng.bytes(size))
            with pytest.raises(UserError, match=path.name):
                read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_no_damage_ends_in_a_traceback(tmp_path, suffix):
    moments = random.Random(3)
    path = tmp_path / f"a{suffix}"
    write(path, some_tensors())
    whole = path.read_bytes()
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(moments.choice((1, 1, 3))):
            data[moments.randrange(len(data))] = moments.randrange(256)
        path.write_bytes(data)
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def safetensors_with(header, data=b"\0" * 16):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"w": {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}}, "F8_E4M3"),
        ({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, "does not fit"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}, "cut short"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "longer than"),
        ({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "damaged"),
        ({"w": {"dtype": "F32", "shape": "x", "data_offsets": [0, 16]}}, "damaged"),
        ({"w": {"shape": [4], "data_offsets": [0, 16]}}, "damaged"),
        ({"w": 3}, "damaged"),
        ([], "damaged"),
    ],
)
def test_a_damaged_safetensors_header(tmp_path, header, says):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_with(header))
    with pytest.raises(UserError, match=says):
        read_heads(path)


def write_sparse(path, first_bytes, rest):
    """A file whose first tensor, of `first_bytes` zeros after its header, takes no room on the disk."""
    with open(path, "wb") as file:
        for chunk in rest:
            if chunk is None:
                file.seek(first_bytes, 1)
            else:
                file.write(chunk)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_tensor_behind_five_gibibytes(tmp_path, suffix):
    from llm_core.checkpoint import ckpt_file, safetensors_file

    path = tmp_path / f"a{suffix}"
    last = np.arange(6, dtype=np.float32)
    heads = {"first": Head(BY_NAME["float32"], (5, 2**28)), "last": head_of(last)}
    size = heads["first"].nbytes
    if suffix == ".safetensors":
        header = safetensors_file._layout(heads, {})[1]
        write_sparse(path, size, [len(header).to_bytes(8, "little") + header, None, last.tobytes()])
    else:
        piece = 2**29
        start = ckpt_file._message_start("first", heads["first"], piece)
        end = ckpt_file._message_start("last", heads["last"], last.nbytes)
        write_sparse(path, piece, [start, None] * (size // piece) + [end, last.tobytes()])
    assert path.stat().st_size > 5 * 2**30
    file = open_tensor_file(path)
    assert file.heads == heads
    np.testing.assert_array_equal(file.read("last"), last)
    file.close()
