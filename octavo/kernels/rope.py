"""Rotary position embedding: the rotation itself. The tables are made by `layers.rotary`.

`rotate` picks an implementation by the device of its input; `rotate_torch` is the twin. On a GPU
`octavo.kernels.qkv` does it together with what stands around it.
"""

from __future__ import annotations

import functools

import torch

from octavo.kernels.cpu import ops as cpu


class Rope:
    """The rotation of a step's tokens: a table, and where in it each token stands.

    Args:
        table: [max_model_len, rot_dim] float32: cos, then sin, of each frequency.
        positions: [num_tokens] int64.
        dtype: in which the gathered `cos` and `sin` are.
    """

    def __init__(self, table: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> None:
        self.table = table
        self.positions = positions
        self.dtype = dtype

    @functools.cached_property
    def _gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.table[self.positions].to(self.dtype).unsqueeze(1).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    @property
    def cos(self) -> torch.Tensor:
        """[num_tokens, 1, rot_dim]; gathered once per step, for the first layer that asks."""
        return self._gathered[0]

    @property
    def sin(self) -> torch.Tensor:
        """[num_tokens, 1, rot_dim], the first half negated."""
        return self._gathered[1]


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
