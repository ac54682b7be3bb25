"""y = x @ weight.T for few tokens, with what stands before and after it in a layer.

Moves: the weight once, out_features x in_features elements; everything else is small. So for up to
some tens of tokens it is bound by memory, and for one token of a small model by the number of
launches: that is why a norm or a gated activation before the product and the residual addition
after it can be part of the same launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from octavo.kernels import launch
from octavo.kernels.activation import gated_activation
from octavo.kernels.norm import rms_norm

# Up to so many tokens the Triton kernels are asked; whether they take a shape is decided there.
MAX_TOKENS = 64
# Up to so many tokens a layer runs in its fused form.
MAX_FUSED_TOKENS = 4


class Around(NamedTuple):
    """What a product is fused with. `norm` and `activation` exclude each other."""

    norm: torch.Tensor | None = None  # weight of an RMSNorm of x
    eps: float = 0.0
    add_one: bool = False  # see `rms_norm`
    activation: str | None = None  # x is gate and up side by side: see `gated_activation`
    residual: torch.Tensor | None = None  # added to the result; may be overwritten


NOTHING = Around()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[..., in_features] -> [..., out_features]"""
    if launch.takes(x) and len(x) <= MAX_TOKENS and weight.itemsize == 2:
        from octavo.kernels import gemv_triton

        if (plan := gemv_triton.plan(len(x), *weight.shape)) is not None:
            return gemv_triton.run(plan, x, weight, bias, NOTHING)
    return F.linear(x, weight, bias)


def fuses(x: torch.Tensor) -> bool:
    """Whether a layer with this input, [num_tokens, size], should use `linear_around`."""
    return launch.takes(x) and x.itemsize == 2


def linear_around(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, around: Around
) -> torch.Tensor:
    """[num_tokens, in_features], or twice as wide with an activation, -> [num_tokens,
    out_features]; may be written over `around.residual`.
    """
    if not fuses(x):
        return linear_around_torch(x, weight, bias, around)
    if len(x) > MAX_FUSED_TOKENS:
        return _linear_onto(prepare(x, around), weight, bias, around.residual)
    from octavo.kernels import gemv_triton

    plan = gemv_triton.plan(len(x), *weight.shape)
    if not isinstance(plan, gemv_triton.GemvPlan):
        return _linear_onto(prepare(x, around), weight, bias, around.residual)
    if around.activation and not gemv_triton.fuses_activation(len(x), *weight.shape):
        x = gated_activation(x, around.activation)
        around = around._replace(activation=None)
    return gemv_triton.run(plan, x, weight, bias, around)


def _linear_onto(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Adds in passing, which saves reading and writing the sum again."""
    if residual is None:
        return linear(x, weight, bias)
    if len(x) <= MAX_TOKENS:
        from octavo.kernels import gemv_triton

        if (plan := gemv_triton.plan(len(x), *weight.shape)) is not None:
            return gemv_triton.run(plan, x, weight, bias, Around(residual=residual))
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())


def linear_around_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, around: Around
) -> torch.Tensor:
    """The twin: step by step."""
    y = F.linear(prepare(x, around), weight, bias)
    return y if around.residual is None else around.residual + y


def prepare(x: torch.Tensor, around: Around) -> torch.Tensor:
    """What stands before the product, on its own."""
    if around.norm is not None:
        return rms_norm(x, around.norm, around.eps, add_one=around.add_one)[0]
    return x if around.activation is None else gated_activation(x, around.activation)
