"""Rotary position embedding: the rotation itself. The tables are made by `layers.rotary`.

`rotate` picks an implementation by the device of its input; `rotate_torch` is the twin.
"""

from __future__ import annotations

import torch

from octavo.kernels.cpu import ops as cpu


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the leading rot_dim of each head; pairs are (i, i + rot_dim / 2).

    Args:
        x: [num_tokens, num_heads, head_dim], may be strided over tokens and heads; may be
            overwritten: go on with the result, which may be x.
        cos: [num_tokens, 1, rot_dim], each half the same.
        sin: [num_tokens, 1, rot_dim], the first half negated.
    """
    if cpu.takes(x):
        return cpu.rotate(x, cos, sin)
    return rotate_torch(x, cos, sin)


def rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The twin; overwrites nothing."""
    rot_dim = cos.shape[-1]
    rotated = x if rot_dim == x.shape[-1] else x[..., :rot_dim]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((second, first), dim=-1) * sin
    return rotated if rot_dim == x.shape[-1] else torch.cat((rotated, x[..., rot_dim:]), dim=-1)
