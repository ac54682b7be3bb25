"""Attention backends behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable

from octavo.attention.base import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    KVLayer,
    SharedPrefix,
)
from octavo.attention.context import ForwardContext
from octavo.attention.cpu_backend import NativeAttention
from octavo.attention.torch_backend import TorchAttention
from octavo.errors import ConfigError


def _make_triton() -> AttentionBackend:
    # Triton is there on GPU machines only.
    from octavo.attention.triton_backend import TritonAttention

    return TritonAttention()


def _make_flashinfer() -> AttentionBackend:
    # An optional package, whose import takes seconds.
    from octavo.attention.flashinfer_backend import FlashInferAttention

    return FlashInferAttention()


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    TorchAttention.name: TorchAttention,
    "triton": _make_triton,
    "flashinfer": _make_flashinfer,
    NativeAttention.name: NativeAttention,
}

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "ForwardContext",
    "KVLayer",
    "SharedPrefix",
    "TorchAttention",
    "get_backend",
]


def get_backend(name: str) -> AttentionBackend:
    """A new instance of the backend with this name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in BACKENDS:
        raise ConfigError(f"Unknown attention backend {name!r}; known: {', '.join(BACKENDS)}.")
    return BACKENDS[name]()
