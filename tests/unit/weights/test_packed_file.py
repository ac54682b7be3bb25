"""Files of packed tensors: what was written comes back, and nothing else does."""

from __future__ import annotations

import io
import os
import struct
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.weights.packed import Packed, size_of
from octavo.weights.packed_file import PackedFileError, is_used, map_packed, write_packed

TENSORS = {
    "a": Packed("Q8_0", (3, 7), torch.arange(238, dtype=torch.uint8)),
    "none": Packed("float32", (0,), torch.empty(0, dtype=torch.uint8)),
    "layer.norm": Packed("float32", (4,), torch.arange(4.0).view(torch.uint8)),
    "big": Packed("Q4_1", (5, 5), torch.randint(256, (100_003,), dtype=torch.uint8)),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "m.packed"
    with path.open("wb") as file:
        assert write_packed(file, "key", TENSORS)
    return path


def equal(left: dict[str, Packed], right: dict[str, Packed]) -> bool:
    return left.keys() == right.keys() and all(
        (tensor.kind, tensor.shape) == (right[name].kind, right[name].shape)
        and torch.equal(tensor.data, right[name].data)
        for name, tensor in left.items()
    )


def test_what_was_written_comes_back_where_kernels_want_it(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = map_packed(path, "key")
        tensors, num_bytes = mapped.tensors, mapped.num_bytes
    assert equal(tensors, TENSORS)
    assert all(tensor.data.data_ptr() % 64 == 0 for tensor in tensors.values() if len(tensor.data))
    assert num_bytes == path.stat().st_size < size_of(TENSORS) + 2000
    path.unlink()
    assert equal(tensors, TENSORS)  # whoever has it keeps it


@given(
    shapes=st.lists(st.integers(0, 300), max_size=8), key=st.text(max_size=20), cut=st.integers(1)
)
def test_any_tensors_and_any_cut(tmp_path_factory, shapes, key, cut):
    path = tmp_path_factory.mktemp("any") / "file"
    tensors = {
        f"tensor {i}": Packed("Q4_0", (size,), torch.full((size,), i, dtype=torch.uint8))
        for i, size in enumerate(shapes)
    }
    with path.open("wb") as file:
        write_packed(file, key, tensors)
    assert equal(map_packed(path, key).tensors, tensors)
    with pytest.raises(PackedFileError, match="another key"):
        map_packed(path, key + "x")
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(PackedFileError):
        map_packed(path, key)
    path.write_bytes(whole + b"\0")
    with pytest.raises(PackedFileError, match="not as long"):
        map_packed(path, key)


def test_no_bit_of_the_header_may_change(path):
    whole = path.read_bytes()
    length = 48 + struct.unpack_from("<Q", whole, 8)[0]
    for i in range(length):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(damaged)
        with pytest.raises(PackedFileError):
            map_packed(path, "key")


@pytest.mark.parametrize("content", [b"", b"OCTAVOPK", b"GGUF" + bytes(100), os.urandom(1000)])
def test_foreign_files(path, content):
    path.write_bytes(content)
    with pytest.raises(PackedFileError):
        map_packed(path, "key")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        map_packed(tmp_path / "none", "key")
    with pytest.raises(OSError, match="directory"):
        map_packed(tmp_path, "key")
    assert not is_used(tmp_path / "none")


def test_a_file_is_in_use_while_a_tensor_lives(path):
    assert not is_used(path)
    first = map_packed(path, "key")
    second = map_packed(path, "key")
    part = first.tensors["big"].data[7:9]
    del first, second
    assert is_used(path)
    del part
    assert not is_used(path)


def test_writing_stops_when_it_is_told_to():
    file = io.BytesIO()
    answers = iter([True, True, False])
    assert not write_packed(file, "key", TENSORS, lambda: next(answers))
    assert 0 < len(file.getvalue()) < size_of(TENSORS)
