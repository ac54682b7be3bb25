"""Linear layers: one matmul each, whatever number of checkpoint tensors it was stored as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from octavo.kernels.linear import Around, linear, linear_around, prepare
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

    def lookup(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The weight's rows `ids` in the model's dtype: what an embedding does."""
        ...


class DenseMethod:
    """The weight as it is: one [out_features, in_features] matrix in the model's dtype."""

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        layer.weight = empty_parameter(out_features, in_features)

    def slots(self, layer: nn.Module, name: str, start: int, length: int) -> dict[str, WeightSlot]:
        return {f"{name}.weight": slot_of(layer.get_parameter("weight"), start, length)}

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]  # create() made it
        return linear(x, weight, bias)

    def lookup(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return F.embedding(ids, weight)


DENSE = DenseMethod()


class MatrixLayer(nn.Module):
    """A layer around one matrix, whose `method` says how that is stored and multiplied."""

    def __init__(self, in_features: int, out_features: int, method: LinearMethod) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.method = method
        method.create(self, in_features, out_features)

    def change_method(self, method: LinearMethod) -> None:
        """Store the matrix in another way from now on; what was loaded is lost."""
        self._parameters.pop("weight", None)
        self.method = method
        method.create(self, self.in_features, self.out_features)


class MergedLinear(MatrixLayer):
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
        out_features = sum(parts.values())
        super().__init__(in_features, out_features, method)
        self.stored = {stored_as: out_features} if stored_as else dict(parts)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., sum of the parts]"""
        return self.method.apply(self, x, self.bias)

    def forward_around(self, x: torch.Tensor, around: Around) -> torch.Tensor:
        """`forward` with what stands around it; x: [num_tokens, ...], few."""
        return _apply_around(self, x, around)

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


class Linear(MatrixLayer):
    """One projection, stored as one checkpoint tensor and an optional bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        method: LinearMethod = DENSE,
    ) -> None:
        super().__init__(in_features, out_features, method)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]"""
        return self.method.apply(self, x, self.bias)

    def forward_around(self, x: torch.Tensor, around: Around) -> torch.Tensor:
        """`forward` with what stands around it; x: [num_tokens, ...], few."""
        return _apply_around(self, x, around)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        """`prefix` is the projection's own dotted path."""
        slots = self.method.slots(self, prefix, 0, self.out_features)
        if self.bias is not None:
            slots[f"{prefix}.bias"] = slot_of(self.bias)
        return slots


def _apply_around(layer: MergedLinear | Linear, x: torch.Tensor, around: Around) -> torch.Tensor:
    """In one launch where the weight is dense, in steps where it is not."""
    if isinstance(layer.method, DenseMethod):
        return linear_around(x, layer.get_parameter("weight"), layer.bias, around)
    x = prepare(x, around)
    y: torch.Tensor = layer(x)
    return y if around.residual is None else around.residual + y
