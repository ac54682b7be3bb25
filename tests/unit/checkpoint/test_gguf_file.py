from __future__ import annotations

import random
import struct

import gguf
import numpy as np
import pytest
from support.tiny_gguf import write_gguf

from octavo.checkpoint.gguf_file import GGML_TYPES, GgufFile
from octavo.checkpoint.gguf_tensors import iter_tensors, read_tensor
from octavo.checkpoint.source import open_gguf
from octavo.errors import CheckpointError, OctavoError, WeightsError


def test_equals_the_gguf_packages_reader(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, extra={"some.flag": True, "general.name": "tiny"})
    ours, reference = GgufFile.open(path), gguf.GGUFReader(path)
    for key, field in reference.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            value = value.tolist() if isinstance(value, np.ndarray) else value
            assert value == pytest.approx(field.contents()), key
    assert list(ours.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (found.offset, found.num_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_type_table_equals_ggmls():
    for number, kind in GGML_TYPES.items():
        reference = gguf.GGMLQuantizationType(number)
        assert reference.name == kind.name
        assert gguf.GGML_QUANT_SIZES[reference] == (kind.block_len, kind.block_bytes)


@pytest.mark.parametrize("qtype", [kind.name for kind in GGML_TYPES.values()])
def test_every_type_decodes_as_gguf_does(tmp_path, qtype):
    path = tmp_path / "m.gguf"
    expected = write_gguf(path, qtype=qtype)
    file = GgufFile.open(path)
    assert {t.type.name for t in file.tensors.values()} == {qtype, "F32"}
    for name, values in expected.items():
        np.testing.assert_array_equal(read_tensor(file, file.tensors[name]), values)


def test_float32_numbers_come_back_as_they_were_meant(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    assert GgufFile.open(path).metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5


def test_unsupported_type_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    raw = np.zeros((4, 66), np.uint8)
    writer.add_tensor("blk.0.odd", raw, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match=r"blk\.0\.odd.*IQ2_XXS"):
        GgufFile.open(path)


def _file(*parts: bytes) -> bytes:
    return b"".join(parts)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    head = _string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def _with_tensors(*entries: bytes, data: int = 256) -> bytes:
    head = _file(b"GGUF", struct.pack("<IQQ", 3, len(entries), 0), *entries)
    return head + bytes(-len(head) % 32 + data)


BROKEN = {
    "empty": b"",
    "magic": b"GGML" + bytes(64),
    "version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
    "many keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "long key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60),
    "long array": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + _string("k")
    + struct.pack("<IIQ", 9, 4, 1 << 61),
    "long strings": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + _string("k")
    + struct.pack("<IIQ", 9, 8, 1 << 61),
    "nested array": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + _string("k")
    + struct.pack("<IIQ", 9, 9, 1),
    "doubled key": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 2)
    + (_string("k") + struct.pack("<IB", 0, 1)) * 2,
    "no UTF-8": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<IB", 0, 1),
    "doubled tensor": _with_tensors(_tensor("t", [8], 0, 0), _tensor("t", [8], 0, 32)),
    "overlap": _with_tensors(_tensor("t", [16], 0, 0), _tensor("u", [8], 0, 32)),
    "past the end": _with_tensors(_tensor("t", [8], 0, 1 << 40)),
    "huge": _with_tensors(_tensor("t", [1 << 62, 1 << 62], 0, 0)),
    "empty tensor": _with_tensors(_tensor("t", [8, 0], 0, 0)),
    "no dimension": _with_tensors(_tensor("t", [], 0, 0)),
    "between alignments": _with_tensors(_tensor("t", [8], 0, 4)),
    "odd alignment": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + _string("general.alignment")
    + struct.pack("<II", 4, 12),
    "parts in an array": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + _string("split.count")
    + struct.pack("<IIQ2I", 9, 4, 2, 1, 2),
    "ragged blocks": _with_tensors(_tensor("t", [33], 2, 0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_headers(tmp_path, name):
    path = tmp_path / "broken.gguf"
    path.write_bytes(BROKEN[name])
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        GgufFile.open(path)


def test_bools_are_zero_and_one(tmp_path):
    path = tmp_path / "m.gguf"
    value = struct.pack("<IIQ", 9, 7, 3) + b"\x00\x01\xff"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("k") + value)
    assert GgufFile.open(path).metadata["k"].view(np.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("arch", "extra", "says"),
    [
        ("llama", {"llama.attention.key_length": 0}, "key_length must be a positive"),
        ("phi3", {"phi3.attention.key_length": 0}, "key_length must be a positive"),
        ("llama", {"llama.attention.head_count_kv": 0}, "head_count_kv must be a positive"),
        ("llama", {"llama.attention.head_count": 1 << 30}, "head"),
        ("llama", {"llama.embedding_length": 128}, "not 128 wide"),
        ("llama", {"llama.rope.freq_base": -1.0}, "freq_base must be above 1"),
        ("llama", {"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token must be true or false"),
    ],
)
def test_metadata_that_no_model_can_have(tmp_path, arch, extra, says):
    path = tmp_path / "m.gguf"
    write_gguf(path, arch, extra=extra)
    with pytest.raises(CheckpointError, match=says):
        open_gguf("m", path)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_rope_factors_are_finite_and_positive(tmp_path, bad):
    path = tmp_path / "m.gguf"
    factors = np.array([1.0] * 31 + [bad], np.float32)
    write_gguf(path, extra_tensors={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match="finite numbers above 0"):
        open_gguf("m", path)


def test_damage_anywhere_is_an_error_or_harmless(tmp_path):
    """Cut the file, and flip bytes of its header, at many places: never a crash or a hang."""
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", qtype="Q8_0")
    good = path.read_bytes()
    header_len = min(tensor.offset for tensor in GgufFile.open(path).tensors.values())
    rng = random.Random(0)
    damaged = [good[:length] for length in rng.sample(range(len(good)), 40)]
    for position in rng.sample(range(header_len), 200):
        flipped = bytearray(good)
        flipped[position] ^= rng.choice((0x01, 0x80, 0xFF))
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            open_gguf("m", path)
            for _ in iter_tensors(GgufFile.open(path)):
                pass
        except OctavoError:
            refused += 1
    assert refused > len(damaged) // 2
