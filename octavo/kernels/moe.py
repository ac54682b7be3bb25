"""Mixture of experts: routing, and the gated feed-forward of the experts that each token chose.

Moves: the weights of every expert that some token chose, 6 x size x intermediate bytes each in 16
bits; flops: 6 x size x intermediate per token and chosen expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from octavo.kernels import launch
from octavo.kernels.activation import gated_activation


class Routing(NamedTuple):
    """Each token's experts, the most likely first."""

    weights: torch.Tensor  # [num_tokens, top_k] float32
    experts: torch.Tensor  # [num_tokens, top_k] int32


def route(logits: torch.Tensor, top_k: int, *, renormalise: bool) -> Routing:
    """Softmax over all experts, [num_tokens, num_experts], then the top_k; `renormalise`: so that
    the weights of those sum to 1.
    """
    if launch.takes(logits):
        from octavo.kernels import moe_triton

        return Routing(*moe_triton.route(logits, top_k, renormalise))
    return route_torch(logits, top_k, renormalise=renormalise)


def route_torch(logits: torch.Tensor, top_k: int, *, renormalise: bool) -> Routing:
    """The twin."""
    weights, experts = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(weights, experts.to(torch.int32))


def run_experts(
    x: torch.Tensor,  # [num_tokens, size]
    gate_up: torch.Tensor,  # [num_experts, 2 * intermediate, size]
    down: torch.Tensor,  # [num_experts, size, intermediate]
    routing: Routing,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # [num_tokens, size]
    """The weighted sum over each token's experts of down(act(gate(x)) * up(x)), plus residual."""
    if launch.takes(x):
        from octavo.kernels import moe_triton

        return moe_triton.run_experts(
            x, gate_up, down, routing.weights, routing.experts, activation, residual
        )
    return run_experts_torch(x, gate_up, down, routing, activation, residual)


def run_experts_torch(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The twin: expert after expert, in float32 sums. Waits for the device."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(routing.experts.flatten().tolist())):
        tokens, ranks = torch.where(routing.experts == expert)
        gated = gated_activation(F.linear(x[tokens], gate_up[expert]), activation)
        y = F.linear(gated, down[expert]).float() * routing.weights[tokens, ranks, None]
        total.index_add_(0, tokens, y)
    return total.to(x.dtype) if residual is None else residual + total.to(x.dtype)
