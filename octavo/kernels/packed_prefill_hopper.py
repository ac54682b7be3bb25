"""`packed_prefill_triton`'s attention for Hopper, with its matrix units and copy engine in hand.

Flops: as there. A program takes 128 rows (query tokens times heads per KV head), 64 for each of two
groups of four warps; a fifth warp has tiles of keys and values copied to shared memory for both.
Each group starts the products of the next scores, then those of this block's values, and takes the
softmax of the next scores while the latter run: 524 TFLOP/s for prompts of 2,048 tokens, 640 for
8,192 and 700 for 8,192 queries of 16,384 keys on an H100, where the compiler's arrangement of the
other kernel has 464, 557 and 531.

Written in Gluon, Triton's lower level, which has no interpreter: its twin is checked on a GPU only.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels import launch

ROWS = 64  # per group of warps
BLOCK_N = 128  # keys of a tile
STAGES = 2  # tiles of keys, and of values, in shared memory: 128 KiB with heads of 128

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _find_sequence(starts_ptr, num_seqs, tile, QUERIES: gl.constexpr):
    """As `paged_prefill_triton.find_sequence`, but looking at 128 sequences at once."""
    lanes = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    base = gl.load(starts_ptr)
    found = 0
    for first in range(0, num_seqs, 128):
        seqs = first + lanes
        starts = gl.load(starts_ptr + seqs, mask=seqs < num_seqs, other=0)
        is_before = (starts - base) // QUERIES + seqs <= tile
        found += gl.sum((is_before & (seqs < num_seqs)).to(gl.int32), 0)
    return found - 1


@gluon.jit
def _take_in(
    scores, highest, total, positions, first_key, full_stop, scale, BLOCK_N: gl.constexpr
):  # fmt: skip
    """A block's weights, and what earlier sums are to be multiplied by."""
    if first_key + BLOCK_N > full_stop:  # some queries do not see all of its keys
        layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        keys = first_key + gl.arange(0, BLOCK_N, layout)
        scores = gl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    higher = gl.maximum(highest, gl.max(scores, 1))
    base = higher * scale
    weights = gl.exp2(scores * scale - base[:, None])
    shrink = gl.exp2(highest * scale - base)
    return weights, shrink, higher, total * shrink + gl.sum(weights, 1)


@gluon.jit
def _copy(
    kv, first_row, k_col, v_col, num_blocks, keys, values, k_ready, v_ready, k_free, v_free,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_BYTES: gl.constexpr,
):  # fmt: skip
    """Fill tiles with keys and values, each as soon as both groups are through with the last."""
    for n in range(num_blocks):
        slot = n % STAGES
        turn = (n // STAGES & 1) ^ 1
        row = first_row + n * BLOCK_N
        mbarrier.wait(k_free.index(slot), turn)
        mbarrier.expect(k_ready.index(slot), NUM_BYTES)
        _copy_tile(kv, [row, k_col], k_ready.index(slot), keys.index(slot))
        mbarrier.wait(v_free.index(slot), turn)
        mbarrier.expect(v_ready.index(slot), NUM_BYTES)
        _copy_tile(kv, [row, v_col], v_ready.index(slot), values.index(slot))


@gluon.jit
def _attend(
    query_ptr, out_ptr, query_tile, chunk_start, first_query, query_len, context_len,
    last_position, num_heads, first_head, num_blocks, scale, keys, values, k_ready, v_ready,
    k_free, v_free, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, ROWS: gl.constexpr,
    DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One group's rows. An arrival waits for the group's four warps."""
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)

    lanes = gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, wide))
    queries = first_query + lanes // GROUP
    exists = (queries < query_len) & (lanes < BLOCK_Q * GROUP)
    heads = (chunk_start + queries).to(gl.int64) * num_heads + first_head + lanes % GROUP
    offsets = heads[:, None] * DIM + dims[None, :]
    query_tile.store(gl.load(query_ptr + offsets, mask=exists[:, None], other=0.0))
    fence_async_shared()

    # Rows beyond the chunk repeat its last query: no row may be without a key.
    queries = first_query + gl.arange(0, ROWS, row_layout) // GROUP
    positions = gl.minimum(context_len + queries, last_position)
    full_stop = context_len + first_query + 1  # keys below are seen by all
    highest = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    acc = gl.full([ROWS, DIM], 0.0, gl.float32, o_layout)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_layout)

    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(query_tile, keys.index(0).permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    weights, shrink, highest, total = _take_in(
        scores, highest, total, positions, 0, full_stop, scale, BLOCK_N
    )
    rounded = gl.convert_layout(weights.to(dtype), p_layout)
    for n in range(num_blocks - 1):
        k_slot = (n + 1) % STAGES
        v_slot = n % STAGES
        mbarrier.wait(k_ready.index(k_slot), (n + 1) // STAGES & 1)
        next_scores = warpgroup_mma(
            query_tile, keys.index(k_slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(v_slot), n // STAGES & 1)
        next_acc = warpgroup_mma(rounded, values.index(v_slot), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[next_scores])
        mbarrier.arrive(k_free.index(k_slot), count=1)
        weights, shrink, highest, total = _take_in(
            scores, highest, total, positions, (n + 1) * BLOCK_N, full_stop, scale, BLOCK_N
        )
        acc = warpgroup_mma_wait(0, deps=[next_acc])
        mbarrier.arrive(v_free.index(v_slot), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        rounded = gl.convert_layout(weights.to(dtype), p_layout)
    last = num_blocks - 1
    mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
    acc = warpgroup_mma(rounded, values.index(last % STAGES), acc)
    out = acc / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
    gl.store(out_ptr + offsets, gl.convert_layout(out.to(dtype), wide), mask=exists[:, None])


@gluon.jit(
    do_not_specialize=["num_seqs", "k_col", "v_col"],
    do_not_specialize_on_alignment=["starts_ptr", "seq_lens_ptr", "rows_ptr"],
)
def hopper_kernel(
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
    GROUP: gl.constexpr,  # query heads per KV head
    BLOCK_Q: gl.constexpr,  # query tokens per group of warps: ROWS // GROUP
    ROWS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    QUERIES: gl.constexpr = 2 * BLOCK_Q
    # The last tiles of a chunk see the most keys: they go first.
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    kv_head = gl.program_id(1)
    num_heads = gl.num_programs(1) * GROUP
    seq = _find_sequence(starts_ptr, num_seqs, tile, QUERIES)
    chunk_start = gl.load(starts_ptr + seq)
    query_len = gl.load(starts_ptr + seq + 1) - chunk_start
    first_query = (tile - (chunk_start - gl.load(starts_ptr)) // QUERIES - seq) * QUERIES
    if first_query >= query_len:
        return
    context_len = gl.load(seq_lens_ptr + seq) - query_len
    first_row = gl.load(rows_ptr + seq)
    last_position = context_len + gl.minimum(first_query + QUERIES, query_len) - 1
    num_blocks = last_position // BLOCK_N + 1

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    query_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, DIM], q_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], kv.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], kv.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(slot), count=1)
        mbarrier.init(v_ready.index(slot), count=1)
        mbarrier.init(k_free.index(slot), count=2)  # both groups
        mbarrier.init(v_free.index(slot), count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_attend, (
                query_ptr, out_ptr, query_tiles.index(0), chunk_start, first_query, query_len,
                context_len, last_position, num_heads, kv_head * GROUP, num_blocks, scale,
                keys, values, k_ready, v_ready, k_free, v_free,
                GROUP, BLOCK_Q, ROWS, DIM, BLOCK_N, STAGES,
            )),
            (_attend, (
                query_ptr, out_ptr, query_tiles.index(1), chunk_start, first_query + BLOCK_Q,
                query_len, context_len, last_position, num_heads, kv_head * GROUP, num_blocks,
                scale, keys, values, k_ready, v_ready, k_free, v_free,
                GROUP, BLOCK_Q, ROWS, DIM, BLOCK_N, STAGES,
            )),
            (_copy, (
                kv, first_row, k_col + kv_head * DIM, v_col + kv_head * DIM, num_blocks,
                keys, values, k_ready, v_ready, k_free, v_free,
                BLOCK_N, STAGES, BLOCK_N * DIM * 2,
            )),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # their registers per thread
    )  # fmt: skip


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
    num_kv_heads: int,
    scale: float,
) -> None:
    """As `packed_prefill_triton.packed_prefill`, with at most ROWS query heads per KV head."""
    num_heads, head_dim = query.shape[1:]
    num_seqs, group = len(seq_lens), num_heads // num_kv_heads
    block_q = ROWS // group
    tile = [BLOCK_N, head_dim]
    overlap = launch.overlaps(query)
    layout = gl.NVMMASharedLayout.get_default_for(tile, _DTYPES[query.dtype])
    hopper_kernel[(num_query_tokens // (2 * block_q) + num_seqs, num_kv_heads)](
        query,
        out,
        TensorDescriptor.from_tensor(kv, tile, layout),
        query_starts,
        seq_lens,
        rows,
        num_seqs,
        k_col,
        v_col,
        scale * 1.4426950408889634,
        GROUP=group,
        BLOCK_Q=block_q,
        ROWS=ROWS,
        DIM=head_dim,
        BLOCK_N=BLOCK_N,
        STAGES=STAGES,
        OVERLAP=overlap,
        **launch.options(overlap, num_warps=4),
    )
