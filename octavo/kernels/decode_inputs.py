"""Where the rows of a step of decodes stand, and their move by one position.

Bytes: block tables, read and written; the rest is nothing. As single operations of torch it would
be a dozen launches, each of which takes as long as a product of a small model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from octavo.kernels import launch


class DecodeInputs(NamedTuple):
    positions: torch.Tensor  # [n] int64
    slot_mapping: torch.Tensor  # [n] int64: block * block_size + offset
    seq_lens: torch.Tensor  # [n] int32, this step's token included
    block_tables: torch.Tensor  # [n, max_blocks] int32


def take_inputs(
    rows: torch.Tensor,  # [n] int64
    num_computed: torch.Tensor,  # [num_rows] int64, one more afterwards for all but the last row
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int32
    block_size: int,
) -> DecodeInputs:
    """The inputs of `rows`, which may have the last one, padding, several times."""
    if launch.takes(block_tables):
        from octavo.kernels import decode_inputs_triton

        return DecodeInputs(
            *decode_inputs_triton.take_inputs(rows, num_computed, block_tables, block_size)
        )
    return take_inputs_torch(rows, num_computed, block_tables, block_size)


def take_inputs_torch(
    rows: torch.Tensor,
    num_computed: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
) -> DecodeInputs:
    """The twin."""
    positions, tables = num_computed[rows], block_tables[rows]
    blocks = tables.gather(1, (positions // block_size)[:, None])[:, 0]
    num_computed[rows] = positions + (rows != len(num_computed) - 1)
    return DecodeInputs(
        positions=positions,
        slot_mapping=blocks.to(torch.int64) * block_size + positions % block_size,
        seq_lens=(positions + 1).to(torch.int32),
        block_tables=tables,
    )
