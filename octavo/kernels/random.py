"""Randomness per request: a number that depends on its seed and the token's position, and on
nothing else.

So a seeded request gives the same tokens alone or among others, and after a preemption or a
restart.
"""

from __future__ import annotations

import torch

# splitmix64 (Steele, Lea, Flood 2014), in wrapping int64 arithmetic.
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical, where torch's own shift is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One uniform number in [0, 1) per row.

    Args:
        seeds: [n] int64.
        positions: [n] int64, position of the token that is being sampled.

    Returns:
        [n] float32, multiples of 2**-24.
    """
    state = _mix(seeds + _GOLDEN) + positions * _GOLDEN
    return _shift_right(_mix(state), 40).to(torch.float32) * 2.0**-24
