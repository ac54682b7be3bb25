"""Attention of chunks of queries over keys and values that lie one after the other.

Flops: 4 x head_dim per query head and visible key, as in `paged_prefill_triton`. There, every key's
address is looked up; here the chip's copy engine fetches whole tiles, which leaves the processors
to the products: 457 against 305 TFLOP/s for prompts of 2,048 tokens on an H100, 545 against 419 for
6,144 queries of 16,384.

Prompts without a context have their keys and values in the projection that they came from. Others
are gathered from the cache first, which pays for long chunks. Those are left to
`packed_prefill_hopper` on the GPUs that it is for.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels import launch
from octavo.kernels.paged_prefill_triton import find_sequence

# Rows (query tokens times heads per KV head) and keys of a tile.
BLOCK_M = 64
BLOCK_N = 64
_GATHERED = 8  # keys per program
# From so many queries on, larger tiles pay: 1.1 to 1.3 times as fast, and 0.65 times with 64.
MIN_WARPGROUP_QUERIES = 1024


@triton.jit
def _attend(
    acc, total, highest, query, positions, kv, first_row, k_col, v_col, start, stop, scale,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the keys [start, stop), which start at a multiple of BLOCK_N."""
    for n in tl.range(start, stop, BLOCK_N):
        k = kv.load([first_row + n, k_col])
        v = kv.load([first_row + n, v_col])
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        if MASKED:
            keys = n + tl.arange(0, BLOCK_N)
            scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = higher * scale
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(highest * scale - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        highest = higher
    return acc, total, highest


@triton.jit(
    do_not_specialize=["num_seqs", "k_col", "v_col"],
    do_not_specialize_on_alignment=["starts_ptr", "seq_lens_ptr", "rows_ptr"],
)
def packed_kernel(
    query_ptr,  # [num_tokens, num_heads, DIM] contiguous
    out_ptr,  # as query
    kv,  # descriptor of [num_rows, width], tiles [BLOCK_N, DIM]
    starts_ptr,  # [num_seqs + 1] int32, token indices
    seq_lens_ptr,  # [num_seqs] int32
    rows_ptr,  # [num_seqs] int32: where each sequence's keys begin in kv
    num_seqs,
    k_col,  # of the first head
    v_col,
    scale,  # of the scores, times log2(e); positive
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_Q: tl.constexpr,  # query tokens per program: ROWS // GROUP
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The last tiles of a chunk see the most keys: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    num_heads = tl.num_programs(1) * GROUP
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    seq = find_sequence(starts_ptr, num_seqs, tile, BLOCK_Q)
    chunk_start = tl.load(starts_ptr + seq)
    query_len = tl.load(starts_ptr + seq + 1) - chunk_start
    first_query = (tile - (chunk_start - tl.load(starts_ptr)) // BLOCK_Q - seq) * BLOCK_Q
    if first_query >= query_len:
        return
    context_len = tl.load(seq_lens_ptr + seq) - query_len
    first_row = tl.load(rows_ptr + seq)
    lanes = tl.arange(0, ROWS)
    queries = first_query + lanes // GROUP
    dims = tl.arange(0, DIM)
    exists = (queries < query_len) & (lanes < BLOCK_Q * GROUP)
    tokens = (chunk_start + queries).to(tl.int64)
    heads = kv_head * GROUP + lanes % GROUP
    offsets = (tokens * num_heads + heads)[:, None] * DIM + dims[None, :]
    query = tl.load(query_ptr + offsets, mask=exists[:, None], other=0.0)
    last_position = context_len + tl.minimum(first_query + BLOCK_Q, query_len) - 1
    # Rows beyond the chunk repeat its last query: no row may be without a key.
    positions = tl.minimum(context_len + queries, last_position)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    k_col += kv_head * DIM
    v_col += kv_head * DIM
    # Keys [0, full_stop) are seen by all queries; [full_stop, last_position] by some.
    full_stop = (context_len + first_query + 1) // BLOCK_N * BLOCK_N
    acc, total, highest = _attend(
        acc, total, highest, query, positions, kv, first_row, k_col, v_col, 0, full_stop, scale,
        BLOCK_N, False,
    )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, query, positions, kv, first_row, k_col, v_col, full_stop,
        last_position + 1, scale, BLOCK_N, True,
    )  # fmt: skip
    out = acc / total[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=exists[:, None])


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "rows_ptr"],
)
def gather_kernel(
    k_ptr,  # [num_blocks, block_size, width]
    v_ptr,  # as k
    table_ptr,  # [num_seqs, max_blocks] int32, rows table_stride apart
    rows_ptr,  # [num_seqs + 1] int32: where each sequence's keys begin in out
    out_ptr,  # [num_rows, 2 * width]: keys, values
    num_seqs,
    table_stride,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    width,
    WIDTH: tl.constexpr,  # rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,  # per program
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    seq = find_sequence(rows_ptr, num_seqs, tile, KEYS)
    start = tl.load(rows_ptr + seq)
    length = tl.load(rows_ptr + seq + 1) - start
    keys = (tile - start // KEYS - seq) * KEYS + tl.arange(0, KEYS)
    exists = keys < length
    blocks = tl.load(
        table_ptr + seq.to(tl.int64) * table_stride + keys // BLOCK_SIZE, mask=exists, other=0
    ).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    mask = exists[:, None] & (cols < width)[None, :]
    offset = keys % BLOCK_SIZE
    k_rows = (blocks * k_block_stride + offset * k_slot_stride)[:, None]
    v_rows = (blocks * v_block_stride + offset * v_slot_stride)[:, None]
    k = tl.load(k_ptr + k_rows + cols[None, :], mask=mask)
    v = tl.load(v_ptr + v_rows + cols[None, :], mask=mask)
    out = out_ptr + (start + keys).to(tl.int64)[:, None] * 2 * width + cols[None, :]
    tl.store(out, k, mask=mask)
    tl.store(out + width, v, mask=mask)


def can_pack(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `packed_prefill` takes heads of this width and kind."""
    return head_dim in (64, 128) and dtype.itemsize == 2


def gather(
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,  # [num_seqs, max_blocks] int32
    rows: torch.Tensor,  # [num_seqs + 1] int32: sums of the sequences' lengths
    num_rows: int,
) -> torch.Tensor:  # [num_rows, 2 * num_kv_heads * head_dim]
    """The keys of some sequences one after the other, and beside them the values."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    num_seqs, width = len(rows) - 1, num_kv_heads * head_dim
    out = torch.empty((num_rows, 2 * width), dtype=k_cache.dtype, device=k_cache.device)
    overlap = launch.overlaps(out)
    gather_kernel[(num_rows // _GATHERED + num_seqs,)](
        k_cache,
        v_cache,
        block_tables,
        rows,
        out,
        num_seqs,
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        width,
        WIDTH=triton.next_power_of_2(width),
        BLOCK_SIZE=block_size,
        KEYS=_GATHERED,
        OVERLAP=overlap,
        **launch.options(overlap, num_warps=8),
    )
    return out


def _hopper(query: torch.Tensor, num_kv_heads: int) -> ModuleType | None:
    """The other implementation, where it can and should be used."""
    num_heads, head_dim = query.shape[1:]
    if head_dim != 128 or not launch.has_warpgroups(query.device):
        return None
    hopper = _load_hopper()
    return hopper if hopper and num_heads // num_kv_heads <= hopper.ROWS else None


def _load_hopper() -> ModuleType | None:
    return launch.load_gluon("packed_prefill_hopper", "long prompts attend")


def packed_prefill(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim] contiguous
    out: torch.Tensor,  # as query
    kv: torch.Tensor,  # [num_rows, width] of a finite number each
    k_col: int,  # where the keys of the first head are; the other heads' follow
    v_col: int,
    rows: torch.Tensor,  # [>= num_seqs] int32: where each sequence's keys begin
    query_starts: torch.Tensor,  # [num_seqs + 1] int32, indices into query
    seq_lens: torch.Tensor,  # [num_seqs] int32
    num_query_tokens: int,  # of these sequences together, at most
    max_query_len: int,  # of one of them, at most
    num_kv_heads: int,
    scale: float,
) -> None:
    """Attend causally, into `out`; only where `can_pack`."""
    if max_query_len >= MIN_WARPGROUP_QUERIES and (hopper := _hopper(query, num_kv_heads)):
        hopper.packed_prefill(
            query, out, kv, k_col, v_col, rows, query_starts, seq_lens, num_query_tokens,
            num_kv_heads, scale,
        )  # fmt: skip
        return
    num_heads, head_dim = query.shape[1:]
    num_seqs, group = len(seq_lens), num_heads // num_kv_heads
    block_m = max(BLOCK_M, triton.next_power_of_2(group))
    block_q = block_m // group
    overlap = launch.overlaps(query)
    packed_kernel[(num_query_tokens // block_q + num_seqs, num_kv_heads)](
        query,
        out,
        TensorDescriptor.from_tensor(kv, [BLOCK_N, head_dim]),
        query_starts,
        seq_lens,
        rows,
        num_seqs,
        k_col,
        v_col,
        scale * 1.4426950408889634,
        GROUP=group,
        BLOCK_Q=block_q,
        ROWS=block_m,
        DIM=head_dim,
        BLOCK_N=BLOCK_N,
        OVERLAP=overlap,
        **launch.options(overlap, 4, 3),
    )
