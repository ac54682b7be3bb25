"""RMSNorm, with the residual addition that precedes it in a transformer block."""

from __future__ import annotations

import torch
from torch import nn

from octavo.kernels.linear import Around
from octavo.kernels.norm import rms_norm
from octavo.layers.parameter import empty_parameter, slot_of
from octavo.weights.slots import WeightSlot


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; see `kernels.norm`, also for `add_one`."""

    def __init__(self, size: int, eps: float, add_one: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.add_one = add_one
        self.weight = empty_parameter(size)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); with no residual yet, x is the residual. The residual
        that is passed in may be overwritten.
        """
        return rms_norm(x, self.weight, self.eps, residual, add_one=self.add_one)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """The norm alone."""
        return rms_norm(x, self.weight, self.eps, add_one=self.add_one)[0]

    def before_product(self) -> Around:
        """The norm as part of the product that follows it."""
        return Around(norm=self.weight, eps=self.eps, add_one=self.add_one)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {f"{prefix}.weight": slot_of(self.weight)}
