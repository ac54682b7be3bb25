"""A mixture of experts in place of the feed-forward layer."""

from __future__ import annotations

import torch
from torch import nn

from octavo.kernels.moe import route, run_experts
from octavo.layers.linear import Linear
from octavo.layers.mlp import checked_activation
from octavo.layers.norm import RMSNorm
from octavo.layers.parameter import empty_parameter, slot_of
from octavo.weights.slots import WeightSlot


class MoE(nn.Module):
    """A router and gated experts, their weights stacked.

    Args:
        size: width of the hidden states.
        intermediate_size: of each expert.
        activation: of the gates.
        num_experts: how many there are.
        top_k: how many each token uses.
        renormalise: whether the weights of those are made to sum to 1.
        stored_as: what the checkpoint calls the whole, and each expert's gate, up and down.
    """

    def __init__(
        self,
        size: int,
        intermediate_size: int,
        activation: str,
        *,
        num_experts: int,
        top_k: int,
        renormalise: bool,
        stored_as: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self.activation = checked_activation(activation)
        self.top_k = top_k
        self.renormalise = renormalise
        self.stored_as = stored_as
        self.gate = Linear(size, num_experts)
        self.gate_up = empty_parameter(num_experts, 2 * intermediate_size, size)
        self.down = empty_parameter(num_experts, size, intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, size] -> [num_tokens, size]"""
        return self._run(x, None)

    def forward_fused(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """x + forward(norm(x))."""
        return self._run(norm.normalize(x), x)

    def _run(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        routing = route(self.gate(x), self.top_k, renormalise=self.renormalise)
        return run_experts(x, self.gate_up, self.down, routing, self.activation, residual)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        """`prefix` ends in "mlp", whatever the checkpoint calls it."""
        whole, gate, up, down = self.stored_as
        prefix = prefix.removesuffix("mlp") + whole
        slots = self.gate.weight_slots(f"{prefix}.gate")
        length = self.gate_up.shape[1] // 2
        for i in range(len(self.down)):
            name = f"{prefix}.experts.{i}"
            gate_up = nn.Parameter(self.gate_up[i], requires_grad=False)  # shares the memory
            slots[f"{name}.{gate}.weight"] = slot_of(gate_up, 0, length)
            slots[f"{name}.{up}.weight"] = slot_of(gate_up, length, length)
            slots[f"{name}.{down}.weight"] = slot_of(
                nn.Parameter(self.down[i], requires_grad=False)
            )
        return slots
