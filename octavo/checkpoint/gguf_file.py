"""The header of a .gguf file, read without trusting it.

Every count, length and offset is compared with the length of the file before it is used, so a cut
or altered file ends in a `CheckpointError` that names it, never in a crash, a hang or a huge
allocation. (The `gguf` package's own reader checks none of this and takes seconds for a large
vocabulary.) Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import CheckpointError, WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 1 << 16  # metadata keys, or tensors; real files have some thousands at most
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How a tensor's values are stored: blocks of `block_len` values in `block_bytes` bytes."""

    name: str
    block_len: int
    block_bytes: int


GGML_TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    30: GgmlType("BF16", 1, 2),
}

# Value types of the metadata: struct format and numpy dtype of the numbers, by type number.
_NUMBERS: dict[int, tuple[str, np.dtype[Any]]] = {
    0: ("<B", np.dtype("<u1")),
    1: ("<b", np.dtype("<i1")),
    2: ("<H", np.dtype("<u2")),
    3: ("<h", np.dtype("<i2")),
    4: ("<I", np.dtype("<u4")),
    5: ("<i", np.dtype("<i4")),
    6: ("<f", np.dtype("<f4")),
    7: ("<?", np.dtype("?")),
    10: ("<Q", np.dtype("<u8")),
    11: ("<q", np.dtype("<i8")),
    12: ("<d", np.dtype("<f8")),
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is row-major, i.e. GGUF's dimensions reversed."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Checked metadata and tensor positions of one file."""

    path: Path
    metadata: dict[str, Any]  # str, int, float, bool, list[str], or a numpy array
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read and check the header.

        Raises:
            CheckpointError: the file is no GGUF file, is cut, or contradicts itself.
            WeightsError: a tensor has a type that cannot be read.
        """
        try:
            data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: empty file
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        try:
            metadata, tensors = _Header(memoryview(data)).parse()  # type: ignore[arg-type]
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
        except (_BadHeaderError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path} is not a usable GGUF file: {error}. Download it again."
            ) from error
        num_parts = metadata.get("split.count", 0)
        if not isinstance(num_parts, int) or num_parts > 1:
            raise CheckpointError(
                f"{path} is one part of a split GGUF file; join the parts with "
                f"`llama-gguf-split --merge` first."
            )
        return cls(path, metadata, tensors)

    def raw(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor: a private (copy-on-write) map of the file."""
        return np.memmap(self.path, np.uint8, "c", tensor.offset, (tensor.num_bytes,))

    def string(self, key: str, default: str | None = None) -> str | None:
        value = self.metadata.get(key, default)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {key} must be a string.")
        return value

    def integer(self, key: str, default: int | None = None) -> int | None:
        """An integer; an array of equal integers (one per layer) counts as one.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"{self.path}: {key} must be one integer.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {key} must be true or false.")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.metadata.get(key, default)
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise CheckpointError(f"{self.path}: {key} must be a finite number.")
        return value


class _BadHeaderError(Exception):
    """What is wrong with the header, without the file's name."""


class _Header:
    """A cursor over the file that never reads past its end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._pos = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if bytes(self._data[:4]) != _MAGIC:
            raise _BadHeaderError("it does not begin with the letters GGUF")
        self._pos = 4
        version = self._int("<I")
        if version not in _VERSIONS:
            raise _BadHeaderError(f"version {version} is not supported (2 and 3 are)")
        num_tensors, num_keys = self._int("<Q"), self._int("<Q")
        if num_tensors > _MAX_ENTRIES or num_keys > _MAX_ENTRIES:
            raise _BadHeaderError(f"{num_tensors} tensors and {num_keys} keys are not plausible")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise _BadHeaderError(f"key {key!r} appears twice")
            metadata[key] = self._value(self._int("<I"))
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        return metadata, self._place(entries, metadata)

    def _take(self, num_bytes: int) -> memoryview:
        end = self._pos + num_bytes
        if end > len(self._data):
            raise _BadHeaderError(f"it ends within its header, at byte {len(self._data)}")
        chunk = self._data[self._pos : end]
        self._pos = end
        return chunk

    def _int(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        return str(self._take(self._int("<Q")), "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise _BadHeaderError(f"unknown metadata type {kind}")
        value = self._int(_NUMBERS[kind][0])
        # 1e-5 was stored as the nearest float32: give back the number that was meant.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self) -> list[str] | npt.NDArray[Any]:
        kind, count = self._int("<I"), self._int("<Q")
        if kind == _STRING:
            if count * 8 > len(self._data) - self._pos:
                raise _BadHeaderError(f"an array of {count} strings does not fit the file")
            return [self._string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise _BadHeaderError(f"arrays of metadata type {kind} are not supported")
        dtype = _NUMBERS[kind][1]
        taken = self._take(count * dtype.itemsize)
        if dtype.kind == "b":  # only 0 and 1 are bools to numpy
            flags: npt.NDArray[Any] = np.frombuffer(taken, np.uint8) != 0
            return flags
        values: npt.NDArray[Any] = np.frombuffer(taken, dtype)
        return values.copy()

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._int("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise _BadHeaderError(f"tensor {name!r} has {num_dims} dimensions")
        dims = tuple(self._int("<Q") for _ in range(num_dims))
        if 0 in dims:
            raise _BadHeaderError(f"tensor {name!r} is empty")
        return name, dims[::-1], self._int("<I"), self._int("<Q")

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        is_integer = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not is_integer or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise _BadHeaderError(f"alignment {alignment!r} is not plausible")
        start = -(-self._pos // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in entries:
            if name in tensors:
                raise _BadHeaderError(f"tensor {name!r} appears twice")
            if offset % alignment:
                raise _BadHeaderError(f"tensor {name!r} does not lie at a multiple of {alignment}")
            kind, num_bytes = _storage(name, shape, type_id)
            if start + offset + num_bytes > len(self._data):
                raise _BadHeaderError(f"tensor {name!r} reaches past the end of the file")
            tensors[name] = GgufTensor(name, shape, kind, start + offset, num_bytes)
        _check_overlap(sorted(tensors.values(), key=attrgetter("offset")))
        return tensors


def _storage(name: str, shape: tuple[int, ...], type_id: int) -> tuple[GgmlType, int]:
    kind = GGML_TYPES.get(type_id)
    if kind is None:
        known = ", ".join(t.name for t in GGML_TYPES.values())
        raise WeightsError(
            f"tensor {name!r} has GGML type {_type_name(type_id)}, which is not supported; "
            f"supported: {known}. Use another quantisation of this model."
        )
    if shape[-1] % kind.block_len:
        raise _BadHeaderError(
            f"rows of tensor {name!r} ({shape[-1]} values) are no multiple of {kind.name}'s "
            f"block of {kind.block_len}"
        )
    return kind, math.prod(shape) // kind.block_len * kind.block_bytes


def _type_name(type_id: int) -> str:
    try:
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(type_id).name)
    except (ImportError, ValueError):  # the package is only needed for quantised values
        return f"number {type_id}"


def _check_overlap(tensors: list[GgufTensor]) -> None:
    for before, after in itertools.pairwise(tensors):
        if before.offset + before.num_bytes > after.offset:
            raise _BadHeaderError(f"tensors {before.name!r} and {after.name!r} overlap")
