"""What a loaded model holds, as it holds it: the form in which weights wait on disk for the next
start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

IN_FULL = "float32"  # the kind of what is not in blocks: what a quantised model computes in


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor of a loaded model."""

    kind: str  # block format, in the order that kernels read, or "float32": as it is
    shape: tuple[int, ...]
    data: torch.Tensor  # [num_bytes] uint8; may be read only


class PackedModel(Protocol):
    """A model whose tensors differ from those of its checkpoint."""

    @property
    def packing(self) -> str:
        """Names whatever the bytes depend on besides the checkpoint: format, CPU, version."""
        ...

    def packed(self) -> dict[str, Packed]:
        """All that was loaded, by name, without copying it."""
        ...

    def load_packed(self, tensors: Mapping[str, Packed]) -> None:
        """Be loaded, by such tensors instead of a checkpoint; matrices are used where they lie.

        Raises:
            WeightsError: they are not exactly what the model needs, and it is not loaded.
        """
        ...


def size_of(tensors: Mapping[str, Packed], *, packed: bool = False) -> int:
    """Bytes of all of them, or of those in blocks, which are used where they lie."""
    return sum(
        tensor.data.nbytes for tensor in tensors.values() if not packed or tensor.kind != IN_FULL
    )
