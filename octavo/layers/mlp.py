"""The gated feed-forward layer: down(act(gate(x)) * up(x))."""

from __future__ import annotations

import torch
from torch import nn

from octavo.errors import UnsupportedModelError
from octavo.kernels.activation import ACTIVATIONS, gated_activation
from octavo.kernels.linear import Around
from octavo.layers.linear import Linear, MergedLinear
from octavo.layers.norm import RMSNorm
from octavo.weights.slots import WeightSlot


def checked_activation(name: str) -> str:
    """The name, if there is an activation that transformers calls so.

    Raises:
        UnsupportedModelError: there is none; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"Activation {name!r} is not implemented; supported: {', '.join(ACTIVATIONS)}."
        )
    return name


class GatedMLP(nn.Module):
    """Gate and up projection as one matmul.

    `stored_as`: checkpoint name of a gate-and-up tensor that is already fused.
    """

    def __init__(
        self,
        size: int,
        intermediate_size: int,
        activation: str,
        *,
        bias: bool = False,
        stored_as: str | None = None,
    ) -> None:
        super().__init__()
        self.activation = checked_activation(activation)
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(size, parts, bias=bias, stored_as=stored_as)
        self.down_proj = Linear(intermediate_size, size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, size] -> [num_tokens, size]"""
        gated = gated_activation(self.gate_up_proj(x), self.activation)
        return self.down_proj(gated)  # type: ignore[no-any-return]

    def forward_fused(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """x + forward(norm(x)), in few launches; may be written over x."""
        gate_up = self.gate_up_proj.forward_around(x, norm.before_product())
        return self.down_proj.forward_around(
            gate_up, Around(activation=self.activation, residual=x)
        )

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {
            **self.gate_up_proj.weight_slots(prefix),
            **self.down_proj.weight_slots(f"{prefix}.down_proj"),
        }
