"""Matrices in 4 or 8 bits times activations in 8 bits, on a CPU.

Q4_0, Q4_1 and Q8_0 matrices of a .gguf file are used exactly as they are, any other is rounded to
Q8_0. Activations are rounded to 8 bits with a scale per row and group of 32 inputs: one scale per
row would be spoiled by the few large values that the residual stream of most models carries.
Prompts are multiplied in bfloat16 where a CPU has tiles for it.
"""

from __future__ import annotations

import torch
from torch import nn

from octavo.errors import WeightsError
from octavo.kernels.cpu import ops
from octavo.weights.blocks import Blocks
from octavo.weights.packed import Packed
from octavo.weights.slots import WeightSlot


class _Parts:
    """The projections that make up one matrix, until all are there and it can be packed."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self._parts: dict[int, Blocks] = {}  # by first row

    def add(self, start: int, blocks: Blocks) -> ops.PackedMatrix | None:
        """The matrix, if this was its last missing part."""
        self._parts[start] = blocks
        if sum(part.shape[0] for part in self._parts.values()) < self.out_features:
            return None
        # In one matrix all rows have one format; 8 bits hold what 4 bits held, nearly.
        if len({part.kind for part in self._parts.values()}) > 1:
            self._parts = {row: to_blocks(p.dequantize()) for row, p in self._parts.items()}
        kind = next(iter(self._parts.values())).kind
        matrix = ops.PackedMatrix(kind, self.out_features, self.in_features)
        for row, part in self._parts.items():
            matrix.fill(part.data, row)
        self._parts = {}
        return matrix


class Int8Method:
    """A `LinearMethod`; needs the native kernels."""

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        layer.parts = _Parts(in_features, out_features)  # type: ignore[assignment]
        layer.matrix = None  # type: ignore[assignment]

    def slots(self, layer: nn.Module, name: str, start: int, length: int) -> dict[str, WeightSlot]:
        parts: _Parts = layer.parts  # type: ignore[assignment]

        def load_blocks(blocks: Blocks) -> None:
            if (matrix := parts.add(start, blocks)) is not None:
                layer.matrix = matrix  # type: ignore[assignment]

        def load(tensor: torch.Tensor) -> None:
            load_blocks(to_blocks(tensor))

        return {f"{name}.weight": WeightSlot((length, parts.in_features), load, load_blocks)}

    def packed(self, layer: nn.Module) -> Packed:
        """The matrix of a layer that has been loaded."""
        matrix: ops.PackedMatrix = layer.matrix  # type: ignore[assignment]
        return Packed(matrix.kind, matrix.shape, matrix.packed)

    def load_packed(self, layer: nn.Module, packed: Packed) -> None:
        """Give a layer what `packed` was; it is used where it lies, and never written to.

        Raises:
            WeightsError: it is not of this layer's shape.
        """
        parts: _Parts = layer.parts  # type: ignore[assignment]
        shape = (parts.out_features, parts.in_features)
        if packed.kind not in ops.KINDS or packed.shape != shape:
            raise WeightsError(f"{packed.kind} {packed.shape} is no packed matrix {shape}.")
        try:
            layer.matrix = ops.PackedMatrix(packed.kind, *shape, packed.data)  # type: ignore[assignment]
        except ValueError as error:
            raise WeightsError(f"{error}.") from error

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix: ops.PackedMatrix = layer.matrix  # type: ignore[assignment]
        return matrix.multiply(x, bias)

    def lookup(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        matrix: ops.PackedMatrix = layer.matrix  # type: ignore[assignment]
        return matrix.lookup(ids)


def to_blocks(tensor: torch.Tensor) -> Blocks:
    """A floating-point matrix as Q8_0: per group of 32, scale = largest magnitude / 127."""
    rows, columns = tensor.shape
    return Blocks("Q8_0", (rows, columns), ops.to_q8_0(tensor))
