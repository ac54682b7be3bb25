"""RMSNorm, with the residual addition that precedes it in a transformer block."""

from __future__ import annotations

import torch
from torch import nn

from octavo.layers.parameter import empty_parameter, slot_of
from octavo.weights.slots import WeightSlot


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32.

    With `add_one` (Gemma) the factor is 1 + weight and is applied before rounding to x's dtype;
    otherwise (Llama) x / rms(x) is rounded first. Both as the reference implementations do.
    """

    def __init__(self, size: int, eps: float, add_one: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.add_one = add_one
        self.weight = empty_parameter(size)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); with no residual yet, x is the residual."""
        residual = x if residual is None else x + residual
        return self.normalize(residual), residual

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """The norm alone."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.add_one:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {f"{prefix}.weight": slot_of(self.weight)}
