"""The most likely token of each row."""

from __future__ import annotations

import torch

from octavo.kernels import launch
from octavo.kernels.cpu import ops as cpu


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[n, vocab] -> [n] int64: the first index of each row's largest value."""
    if launch.takes(logits):
        from octavo.kernels import sampling_triton

        return sampling_triton.argmax(logits)
    return cpu.argmax(logits) if cpu.takes(logits) else logits.argmax(dim=-1)
