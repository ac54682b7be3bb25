"""Tensors of a .gguf file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from octavo.checkpoint.gguf_file import GgufFile
from octavo.checkpoint.gguf_tensors import GgufBlocks, iter_stored
from octavo.weights.blocks import BLOCK_BYTES, Blocks


def iter_gguf(path: Path) -> Iterator[tuple[str, torch.Tensor | Blocks]]:
    """Every (Hugging Face name, tensor), on the CPU: matrices in a format that `Blocks` knows as
    they are, all others float32 or (where stored so) float16.

    Raises:
        CheckpointError: the file is damaged.
        WeightsError: a tensor of an unsupported type, or one that is no part of the architecture.
    """
    for name, values in iter_stored(GgufFile.open(path), frozenset(BLOCK_BYTES)):
        if isinstance(values, GgufBlocks):
            yield name, Blocks(values.kind, values.shape, torch.from_numpy(values.data))
        else:
            yield name, torch.from_numpy(values)
