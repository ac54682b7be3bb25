"""Matrices in GGUF's simple block formats, which some layers can use as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 32  # values of a row that share a scale
# Name -> bytes of a block: a float16 scale, with Q4_1 a float16 minimum, then 4- or 8-bit integers.
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of `shape` in blocks of GROUP values."""

    kind: str  # a key of BLOCK_BYTES
    shape: tuple[int, int]
    data: torch.Tensor  # [rows, bytes of a row] uint8; a row's last block may be padded

    def dequantize(self) -> torch.Tensor:
        """The values in float32: scale * q, scale * (q - 8) or scale * q + minimum."""
        rows, columns = self.shape
        blocks = self.data.reshape(rows, -1, BLOCK_BYTES[self.kind])
        scale = blocks[..., :2].contiguous().view(torch.float16).float()  # [rows, groups, 1]
        if self.kind == "Q8_0":
            values = scale * blocks[..., 2:].view(torch.int8)
        else:
            quants = blocks[..., -16:]
            values = torch.cat((quants & 15, quants >> 4), dim=-1).float()
            if self.kind == "Q4_0":
                values = scale * values.sub_(8)
            else:
                minimum = blocks[..., 2:4].contiguous().view(torch.float16).float()
                values = values.mul_(scale).add_(minimum)
        return values.flatten(1)[:, :columns]
