"""Tensors of a .gguf file, dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from octavo.checkpoint.gguf_file import GgufFile
from octavo.checkpoint.gguf_tensors import iter_tensors


def iter_gguf(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (Hugging Face name, tensor), float32 or (where stored so) float16, on the CPU.

    Raises:
        CheckpointError: the file is damaged.
        WeightsError: a tensor of an unsupported type, or one that is no part of the architecture.
    """
    for name, values in iter_tensors(GgufFile.open(path)):
        yield name, torch.from_numpy(values)
