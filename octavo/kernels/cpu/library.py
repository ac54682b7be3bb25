"""The compiled kernels: found, loaded and declared once.

A shared library with a plain C interface (csrc/), called through ctypes, which lets go of the GIL.
It has a thread pool of its own and links no OpenMP, so there is never a second OpenMP runtime
beside torch's. Where it was not built (no C compiler), `load()` is None and torch does the work.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from octavo.log import get_logger

logger = get_logger(__name__)


class Matrix(ctypes.Structure):
    """`matrix` of csrc/native.h."""

    _fields_ = (
        ("packed", c_void_p),
        ("kind", c_int32),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("num_groups", c_int32),
    )


class AttentionCall(ctypes.Structure):
    """`attention` of csrc/native.h."""

    _fields_ = (
        ("query", c_void_p),
        ("query_stride", c_int64),
        ("output", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("kv_type", c_int32),
    )


class Batch(ctypes.Structure):
    """`batch` of csrc/native.h."""

    _fields_ = (
        ("slots", c_void_p),
        ("query_lens", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("num_tokens", c_int64),
        ("num_seqs", c_int32),
        ("block_size", c_int32),
        ("queries", c_void_p),
        ("role_ends", c_void_p),
        ("num_roles", c_int32),
    )


class Layer(ctypes.Structure):
    """`layer` of csrc/layers.c."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((f"{name}_bias", c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((f"{name}_norm", c_void_p) for name in ("input", "post", "query", "key")),
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "window")),
        *((name, c_float) for name in ("scale", "softcap", "norm_eps", "head_norm_eps")),
        *((name, c_int32) for name in ("norm_adds_one", "act")),
    )


class Penalties(ctypes.Structure):
    """`penalties` of csrc/sampling.c."""

    _fields_ = (("repetition", c_float), ("frequency", c_float), ("presence", c_float))


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "octavo_use_isa": (c_char_p, (c_char_p,)),
    "octavo_isa": (c_char_p, ()),
    "octavo_packing_version": (c_int32, ()),
    "octavo_set_threads": (None, (c_int32,)),
    "octavo_get_threads": (c_int32, ()),
    "octavo_packed_bytes": (c_int64, (c_int32, c_int64, c_int64)),
    "octavo_pack": (None, (POINTER(Matrix), c_void_p, c_int64, c_int64)),
    "octavo_to_q8_0": (None, (c_void_p, c_int32, c_int64, c_int64, c_void_p)),
    "octavo_lookup": (None, (POINTER(Matrix), c_void_p, c_int64, c_void_p)),
    "octavo_linear": (
        None,
        (POINTER(Matrix), c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32),
    ),
    "octavo_rms_norm": (
        None,
        (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int32),
    ),
    "octavo_rotate": (
        None,
        (c_void_p, c_int64, c_int64, c_int32, c_int64, c_void_p, c_void_p, c_int64),
    ),
    "octavo_gate": (None, (c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int32)),
    "octavo_argmax": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "octavo_sample": (None, (c_void_p, c_int64, c_int64, *(c_void_p,) * 7)),
    "octavo_rate": (None, (c_void_p, c_int64, c_int64, c_int32, *(c_void_p,) * 3)),
    "octavo_penalise": (None, (c_void_p, c_int64, c_void_p, c_void_p, POINTER(Penalties))),
    "octavo_attention_fits": (c_int32, (c_int32, c_int32, c_int32)),
    "octavo_attention": (
        None,
        (POINTER(AttentionCall), POINTER(Batch), c_void_p, c_int64, c_void_p, c_int64),
    ),
    "octavo_layer_floats": (c_int64, (POINTER(Layer),)),
    "octavo_layers": (
        None,
        (
            *(POINTER(Layer), c_int32, c_void_p, c_void_p),
            *(POINTER(c_void_p), POINTER(c_void_p), c_int32, POINTER(Batch), POINTER(Batch)),
            *(c_void_p, c_void_p, c_int64, c_void_p),
        ),
    ),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, set to the best instruction set of this CPU; None where it was not built."""
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_native{suffix}"
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:  # of another machine, or of an older version
            logger.warning("%s cannot be used: %s. Install octavo again.", path, error)
            continue
        library.octavo_use_isa(b"")
        return library
    return None


def is_available() -> bool:
    return load() is not None


def use_isa(name: str) -> bool:
    """Switch to an instruction set ("generic", "avx2", "avxvnni", "avx512", "amx", "neon"; "" is
    the best); False if this CPU, or the compiler that built the library, lacks it. Matrices packed
    before become unreadable, except that "avx512" and "amx" read each other's, and so do "avx2" and
    "avxvnni": for tests and comparisons.
    """
    library = load()
    return library is not None and library.octavo_use_isa(name.encode()) is not None


def isa() -> str:
    """The instruction set in use: see `use_isa`."""
    library = load()
    assert library is not None
    return library.octavo_isa().decode()  # type: ignore[no-any-return]


def packing() -> str:
    """Names the order and the rounding in which matrices are packed now: "avx512-2". Where two
    processes agree in it, so do the bytes of their matrices.
    """
    library = load()
    assert library is not None
    order = {"amx": "avx512"}.get(isa(), isa())  # tiles are made of what lies there for vectors
    return f"{order}-{library.octavo_packing_version()}"


def set_threads(num_threads: int) -> None:
    """Threads of the kernels, the caller's included. 1 until somebody asks for more."""
    library = load()
    if library is not None:
        library.octavo_set_threads(num_threads)
