"""Writing GGUF files by hand, and finding the fields of one: independent of what is fuzzed."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fuzz.mutators import INTERESTING_INTS, mutate_bytes

NUMBER_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
NUMBER_LAYOUTS |= {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dims: tuple[int, ...]  # as the file has them: columns first
    type_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Field:
    """A number of the header. `entry`: where the key or tensor that it is part of begins."""

    kind: str  # "count", "length", "type", "dims", "dim", "tensor type", "offset" or "value"
    start: int
    end: int
    entry: int


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """A metadata value with its type. An array's `content` is (element type, elements)."""
    return struct.pack("<I", kind) + _plain(kind, content)


def _plain(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        inner, items = content
        head = struct.pack("<IQ", inner, len(items))
        return head + b"".join(_plain(inner, item) for item in items)
    return struct.pack("<" + NUMBER_LAYOUTS[kind], content)


def write(metadata: dict[str, tuple[int, Any]], tensors: list[Tensor], version: int = 3) -> bytes:
    """A whole file, aligned to 32 bytes."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    parts += [string(key) + value(*pair) for key, pair in metadata.items()]
    offset, blobs = 0, []
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
        parts.append(string(tensor.name) + dims + struct.pack("<IQ", tensor.type_id, offset))
        blobs.append(tensor.data + bytes(-len(tensor.data) % 32))
        offset += len(blobs[-1])
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + b"".join(blobs)


def fields_of(data: bytes) -> list[Field]:
    """Every number of the header, as far as it can be read."""
    fields: list[Field] = []
    with contextlib.suppress(struct.error, KeyError, OverflowError, RecursionError):
        _Walk(data, fields).run()
    return fields


class _Walk:
    def __init__(self, data: bytes, fields: list[Field]) -> None:
        self.data, self.fields, self.pos, self.entry = data, fields, 4, 4

    def run(self) -> None:
        self.number("value", "I")
        num_tensors, num_keys = self.number("count", "Q"), self.number("count", "Q")
        for _ in range(min(num_keys, 1000)):
            self.entry = self.pos
            self.string()
            self.value(self.number("type", "I"))
        for _ in range(min(num_tensors, 1000)):
            self.entry = self.pos
            self.string()
            for _ in range(min(self.number("dims", "I"), 8)):
                self.number("dim", "Q")
            self.number("tensor type", "I")
            self.number("offset", "Q")
        self.entry = self.pos
        self.fields.append(Field("end", self.pos, self.pos, self.pos))

    def number(self, kind: str, layout: str) -> Any:
        size = struct.calcsize("<" + layout)
        (found,) = struct.unpack_from("<" + layout, self.data, self.pos)
        self.fields.append(Field(kind, self.pos, self.pos + size, self.entry))
        self.pos += size
        return found

    def string(self) -> None:
        self.pos += self.number("length", "Q")

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.string()
        elif kind == ARRAY:
            inner, count = self.number("type", "I"), self.number("count", "Q")
            for _ in range(min(count, 300)):
                self.value(inner)
        else:
            self.number("value", NUMBER_LAYOUTS[kind])


_INTS_OF_KIND = {
    "type": (*range(14), 2**32 - 1),
    "tensor type": (*range(41), 2**31, 2**32 - 1),
    "dims": (*range(7), 2**32 - 1),
}


def mutate(data: bytes, rng: random.Random, keys: Sequence[str]) -> bytes:
    """Change one field, double, remove or replace one entry, cut the file, or a blind change.

    `keys` are names of metadata that mean something.
    """
    fields = fields_of(data)
    choice = rng.random()
    if not fields or choice < 0.07:
        return mutate_bytes(data, rng)
    head = 3  # version and counts: most changes there end the reading at once
    field = rng.choice(fields if rng.random() < 0.05 else fields[head:] or fields)
    if choice < 0.1:
        return data[: rng.choice((field.start, field.end))]
    entries = sorted({f.entry for f in fields if f.entry > 4})
    if choice < 0.25 and len(entries) > 1:
        return _change_entries(data, entries, rng)
    if choice < 0.75 and len(entries) > 1:
        return _put_key(data, entries, rng.choice(keys), rng)
    size = field.end - field.start
    old = int.from_bytes(data[field.start : field.end], "little")
    near = (old + 1, old - 1, old * 2, old // 2, len(data) - field.end, len(data), old ^ 1 << 63)
    choices = _INTS_OF_KIND.get(field.kind) or (*near, *INTERESTING_INTS)
    new = (rng.choice(choices) % (1 << 8 * size)).to_bytes(size, "little") if size else b"\0"
    return data[: field.start] + new + data[field.end :]


def _change_entries(data: bytes, entries: list[int], rng: random.Random) -> bytes:
    """Double, remove or swap keys and tensors; mostly with the counts put right."""
    index = rng.randrange(len(entries) - 1)
    start, end = entries[index], entries[index + 1]
    entry = data[start:end]
    num_tensors, num_keys = struct.unpack_from("<QQ", data, 8)  # the fields end after these
    is_tensor = index >= num_keys
    operation = rng.choice(("double", "remove", "move"))
    if operation == "double":
        raw, change = bytearray(data[:end] + entry + data[end:]), 1
    elif operation == "remove":
        raw, change = bytearray(data[:start] + data[end:]), -1
    else:
        to = entries[rng.randrange(index + 1)]
        raw, change = bytearray(data[:to] + entry + data[to:start] + data[end:]), 0
    if rng.random() < 0.9:
        position, old = (8, num_tensors) if is_tensor else (16, num_keys)
        struct.pack_into("<Q", raw, position, (old + change) % 2**64)
    return bytes(raw)


def _put_key(data: bytes, entries: list[int], key: str, rng: random.Random) -> bytes:
    """A metadata key with a well-formed value of any type: in its own place, or as one more."""
    num_keys = min(struct.unpack_from("<Q", data, 16)[0], len(entries) - 1)
    raw = string(key)
    for start, end in pairwise(entries[: num_keys + 1]):
        if data.startswith(raw, start):
            return data[:start] + raw + _any_value(rng) + data[end:]
    count = struct.pack("<Q", num_keys + 1)
    return data[:16] + count + raw + _any_value(rng) + data[24:]


_TEXTS = ("", "none", "linear", "yarn", "gpt2", "llama", "phi3", "default", "x y", "\x00", "\u2581")


def _any_value(rng: random.Random) -> bytes:
    kind = rng.choice((*NUMBER_LAYOUTS, STRING, STRING, ARRAY, ARRAY, ARRAY))
    if kind == ARRAY:
        inner = rng.choice((*NUMBER_LAYOUTS, STRING, STRING, STRING))
        count = rng.choice((0, 1, 2, 11, 11, 11, 12, 300))
        return value(ARRAY, (inner, [_any_content(inner, rng) for _ in range(count)]))
    return value(kind, _any_content(kind, rng))


def _any_content(kind: int, rng: random.Random) -> Any:
    if kind == STRING:
        return rng.choice(_TEXTS)
    layout = NUMBER_LAYOUTS[kind]
    if layout in "fd":
        return rng.choice((0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"), 4.0))
    if layout == "?":
        return rng.random() < 0.5
    bits = 8 * struct.calcsize(layout)
    number = rng.choice(INTERESTING_INTS) % (1 << bits)
    return number - (1 << bits) if layout.islower() and number >> (bits - 1) else number
