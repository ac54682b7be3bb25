"""Safetensors files: header and tensors, as the loader reads them.

Checked beside what `oracle` says: the tensors of a file that is read have the bytes that an
independent reading of its header gives them, inside the file, and no two share any.
"""

from __future__ import annotations

import json
import random
import struct
from itertools import pairwise
from typing import Any

import torch

from fuzz import oracle
from fuzz.mutators import INTERESTING_INTS, mutate_bytes, mutate_tree
from octavo.errors import OctavoError
from octavo.weights.safetensors import iter_safetensors

INSTRUMENTED = ("octavo.weights",)
MAX_LEN = 16 << 10

_PATH = oracle.scratch_folder() / "model.safetensors"
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}
_DTYPES = (*_SIZES, "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "U16")
_DTYPES += ("U32", "U64", "I8", "I16", "f32", "F32\x00")
_WORDS = (*_DTYPES, "dtype", "shape", "data_offsets", "__metadata__", "a", [0, 0], [0, 16], [2**40])


def check(data: bytes) -> None:
    _PATH.write_bytes(data)
    with oracle.judged(len(data)):
        found = {}
        for name, tensor in iter_safetensors([_PATH]):
            oracle.expect(name not in found, f"{name!r} comes twice")
            raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
            found[name] = (tuple(tensor.shape), raw.numpy().tobytes())
        _compare(data, found)


def _compare(data: bytes, found: dict[str, Any]) -> None:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    oracle.expect(set(header) == set(found), "other names than the header's")
    spans = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        oracle.expect(0 <= start <= end <= len(body), f"{name!r} out of bounds")
        shape, content = found[name]
        oracle.expect(shape == tuple(entry["shape"]), f"{name!r} of another shape")
        oracle.expect(content == body[start:end], f"{name!r} has other bytes")
        spans += [(start, end)] if end > start else []
    for before, after in pairwise(sorted(spans)):
        oracle.expect(before[1] <= after[0], "tensors overlap")
    oracle.expect(sum(end - start for start, end in spans) == len(body), "bytes without an owner")


def write(entries: dict[str, Any], body: bytes) -> bytes:
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def seeds() -> list[bytes]:
    """Each dtype, one to four tensors, with scalars, empty tensors and metadata among them."""
    rng = random.Random(0)
    made = []
    for dtype, size in _SIZES.items():
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in (("a.weight", [2, 3]), ("b", [4]), ("s", []), ("e", [0, 5])):
            start = end
            count = 1
            for dim in shape:
                count *= dim
            end += count * size
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        made.append(write(entries, rng.randbytes(end) if dtype != "BOOL" else bytes(end)))
    return made


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A change to the header's JSON, mostly with its length put right; or to length or bytes."""
    choice = rng.random()
    if choice < 0.15 or len(data) < 10:
        return mutate_bytes(data, rng)
    (length,) = struct.unpack_from("<Q", data)
    if choice < 0.25:
        near = (length + 1, length - 1, len(data), len(data) - 8, len(data) - 7, 100_000_001)
        return struct.pack("<Q", rng.choice((*near, *INTERESTING_INTS)) % 2**64) + data[8:]
    try:
        entries = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    body = data[8 + length :] if length < len(data) else b""
    if choice < 0.45 and isinstance(entries, dict):
        entries = _shifted(entries, rng)
    else:
        entries = mutate_tree(entries, rng, _WORDS)
    if rng.random() < 0.1:
        body = rng.choice((body[:-1], body + b"\0", b"", body * 2))
    raw = json.dumps(entries).encode()
    if rng.random() < 0.1:  # the same name twice, which JSON allows
        raw = raw[:-1] + b"," + raw[1:]
    return struct.pack("<Q", len(raw)) + raw + body


def _shifted(entries: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One tensor elsewhere: over another, past the end, the wrong way round."""
    tensors = [entry for entry in entries.values() if _has_span(entry)]
    if not tensors:
        return entries
    entry, other = rng.choice(tensors), rng.choice(tensors)
    start, end = entry["data_offsets"]
    by = rng.choice((1, -1, 4, 8, 1 << 40, 1 << 63))
    entry["data_offsets"] = rng.choice(
        ([start + by, end + by], [start, end + by], [end, start], list(other["data_offsets"]))
    )
    return entries


def _has_span(entry: Any) -> bool:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)


def check_seeds() -> None:
    """Seeds are files that pass: else the fuzzing would not get past the first check."""
    for data in seeds():
        _PATH.write_bytes(data)
        try:
            oracle.expect(len(list(iter_safetensors([_PATH]))) == 4, "a seed lacks tensors")
        except OctavoError as error:
            raise oracle.ViolationError(f"a seed is refused: {error}") from error
