"""Inputs of decodes in one launch. See `octavo.kernels.decode_inputs`."""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels import launch

BLOCK = 1024  # entries of a block table per iteration


@triton.jit(do_not_specialize=["scratch", "max_blocks"])
def take_inputs_kernel(
    rows_ptr,  # [n]
    num_computed_ptr,  # [scratch + 1]
    tables_ptr,  # [scratch + 1, max_blocks] contiguous
    positions_ptr,  # [n], out, as those that follow
    slots_ptr,
    seq_lens_ptr,
    out_tables_ptr,  # [n, max_blocks] contiguous
    scratch,
    max_blocks,
    block_size,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows_ptr + index)
    position = tl.load(num_computed_ptr + row)
    table_ptr = tables_ptr + row * max_blocks
    block = tl.load(table_ptr + position // block_size).to(tl.int64)
    tl.store(positions_ptr + index, position)
    tl.store(slots_ptr + index, block * block_size + position % block_size)
    tl.store(seq_lens_ptr + index, (position + 1).to(tl.int32))
    # Programs of the scratch row read and write 0, whoever comes first.
    tl.store(num_computed_ptr + row, position + (row != scratch).to(tl.int64))
    cols = tl.arange(0, BLOCK)
    for start in tl.range(0, max_blocks, BLOCK):
        mask = start + cols < max_blocks
        entries = tl.load(table_ptr + start + cols, mask=mask, other=0)
        tl.store(out_tables_ptr + index * max_blocks + start + cols, entries, mask=mask)


def take_inputs(
    rows: torch.Tensor,  # [n] int64
    num_computed: torch.Tensor,  # [num_rows] int64, changed
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int32 contiguous
    block_size: int,
) -> tuple[torch.Tensor, ...]:
    """As `decode_inputs.take_inputs`."""
    num_rows, max_blocks = block_tables.shape
    positions, slots = torch.empty_like(rows), torch.empty_like(rows)
    seq_lens = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    tables = torch.empty(len(rows), max_blocks, dtype=torch.int32, device=rows.device)
    outputs = positions, slots, seq_lens, tables
    overlap = launch.overlaps(block_tables)
    take_inputs_kernel[(len(rows),)](
        rows,
        num_computed,
        block_tables,
        *outputs,
        num_rows - 1,
        max_blocks,
        block_size,
        BLOCK=BLOCK,
        OVERLAP=overlap,
        **launch.options(overlap, num_warps=4),
    )
    return outputs
