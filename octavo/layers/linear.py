"""Linear layers: one matmul each, whatever number of checkpoint tensors it was stored as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from octavo.layers.parameter import empty_parameter, slot_of
from octavo.weights.slots import WeightSlot


class LinearMethod(Protocol):
    """How a linear layer stores its weight and multiplies by it: what quantisation replaces."""

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        """Add the weight's parameters to the layer."""
        ...

    def slots(self, layer: nn.Module, name: str, start: int, length: int) -> dict[str, WeightSlot]:
        """The checkpoint tensors of the projection `name`, which fills output rows
        [start, start + length).
        """
        ...

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x @ weight.T + bias."""
        ...


class DenseMethod:
    """The weight as it is: one [out_features, in_features] matrix in the model's dtype."""

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        layer.weight = empty_parameter(out_features, in_features)

    def slots(self, layer: nn.Module, name: str, start: int, length: int) -> dict[str, WeightSlot]:
        return {f"{name}.weight": slot_of(layer.get_parameter("weight"), start, length)}

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]  # create() made it
        return F.linear(x, weight, bias)


DENSE = DenseMethod()


class MergedLinear(nn.Module):
    """Projections of one input, multiplied as one matrix.

    Args:
        in_features: width of the input.
        parts: output rows of each projection by its checkpoint name, in the order of the result.
        bias: whether every projection has a bias.
        stored_as: name of the one checkpoint tensor that already holds all parts in this order;
            None where each part is a tensor of its own.
        method: how the weight is stored and multiplied.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        stored_as: str | None = None,
        method: LinearMethod = DENSE,
    ) -> None:
        super().__init__()
        out_features = sum(parts.values())
        self.stored = {stored_as: out_features} if stored_as else dict(parts)
        self.method = method
        method.create(self, in_features, out_features)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., sum of the parts]"""
        return self.method.apply(self, x, self.bias)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        """`prefix` is the dotted path of the module that holds the projections."""
        slots: dict[str, WeightSlot] = {}
        start = 0
        for part, length in self.stored.items():
            name = f"{prefix}.{part}"
            slots.update(self.method.slots(self, name, start, length))
            if self.bias is not None:
                slots[f"{name}.bias"] = slot_of(self.bias, start, length)
            start += length
        return slots


class Linear(nn.Module):
    """One projection, stored as one checkpoint tensor and an optional bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        method: LinearMethod = DENSE,
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.method = method
        method.create(self, in_features, out_features)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]"""
        return self.method.apply(self, x, self.bias)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        """`prefix` is the projection's own dotted path."""
        slots = self.method.slots(self, prefix, 0, self.out_features)
        if self.bias is not None:
            slots[f"{prefix}.bias"] = slot_of(self.bias)
        return slots
