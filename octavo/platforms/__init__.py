"""One small object per device kind: memory, dtypes, default backends."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch

from octavo.config.sections import DeviceInfo
from octavo.errors import ConfigError
from octavo.platforms.base import Platform
from octavo.platforms.cpu import CpuPlatform
from octavo.platforms.cuda import CudaPlatform

ENTRY_POINT_GROUP = "octavo.platforms"

__all__ = ["CpuPlatform", "CudaPlatform", "DeviceInfo", "Platform", "detect"]


def detect(device: str) -> Platform:
    """The platform for "auto", "cpu", "cuda", "cuda:1" or a kind that an entry point adds.

    "auto" prefers added kinds, then CUDA, then the CPU.

    Raises:
        ConfigError: the kind is unknown, or this machine has no such device.
    """
    kind, _, index_text = device.partition(":")
    if index_text and not index_text.isdigit():
        raise ConfigError(f"Device {device!r} is malformed: write KIND or KIND:INDEX.")
    index = int(index_text or 0)
    makers = _makers()
    if device == "auto":
        return next(found for make in makers.values() if (found := make(index)) is not None)
    if kind not in makers:
        raise ConfigError(f"Unknown device {device!r}; known: auto, {', '.join(makers)}.")
    found = makers[kind](index)
    if found is None:
        raise ConfigError(
            f"Device {device!r} was asked for, but torch {torch.__version__} finds none here. "
            "Install a torch build and a driver for it, or use device 'cpu'."
        )
    return found


def _makers() -> dict[str, Callable[[int], Platform | None]]:
    """Every kind, in the order in which "auto" tries them."""
    makers: dict[str, Callable[[int], Platform | None]] = {
        entry.name: entry.load()
        for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    }
    return {**makers, "cuda": CudaPlatform.find, "cpu": CpuPlatform.find}
