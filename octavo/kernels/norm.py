"""RMSNorm, with the residual addition that precedes it in a transformer block.

`rms_norm` picks an implementation by the device of its input; `rms_norm_torch` is the twin that
every one of them is compared with. Bytes moved: x and residual read, norm and sum written.
"""

from __future__ import annotations

import torch

from octavo.kernels import launch
from octavo.kernels.cpu import ops as cpu


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    add_one: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual); with no residual, x itself is the second.

    Args:
        x: [..., size]; the norm is over the last dimension, computed in float32.
        weight: [size].
        eps: added to the mean square.
        residual: as x; may be overwritten.
        add_one: the factor is 1 + weight (Gemma), applied before rounding to x's dtype; otherwise
            (Llama) x / rms(x) is rounded first. Both as the reference implementations do.
    """
    if cpu.takes(x):
        return cpu.rms_norm(x, weight, eps, residual, add_one)
    if launch.takes(x):
        from octavo.kernels import norm_triton

        return norm_triton.rms_norm(x, weight, eps, residual, add_one)
    return rms_norm_torch(x, weight, eps, residual, add_one=add_one)


def rms_norm_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    add_one: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin; overwrites nothing."""
    residual = x if residual is None else x + residual
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if add_one:
        return (wide * (1.0 + weight.float())).to(x.dtype), residual
    return weight * wide.to(x.dtype), residual
