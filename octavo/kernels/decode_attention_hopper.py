"""Attention of one token within `decode_layers_hopper`: to a part of its context, and the parts put
together.

Bytes: as `paged_decode_triton`. A part's program has each of eight warps take some keys at a time,
by element rather than by matrix units, which a few query heads per KV head would leave idle.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

KEYS = gl.constexpr(4)  # per lane in a step
# A lane is the threads that share a key, eight numbers of its head each; so many of 256 threads
# times their numbers are a lane's head.
TILE = gl.constexpr(256 * 8)
# Where Gluon calls it otherwise: it is not yet settled.
_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def view(shared, shape: gl.constexpr):
    """Shared memory of float32, as another shape."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if _IS_PUBLIC:
        return shared.reinterpret(gl.float32, shape, flat)
    else:
        return shared._reinterpret(gl.float32, shape, flat)


@gluon.jit
def _positions(first, layout: gl.constexpr, LANES: gl.constexpr):
    """[KEYS, LANES]"""
    rows: gl.constexpr = gl.SliceLayout(2, layout)
    keys = gl.arange(0, KEYS, gl.SliceLayout(1, rows))
    return first + keys[:, None] * LANES + gl.arange(0, LANES, gl.SliceLayout(0, rows))[None, :]


@gluon.jit
def find_keys(
    block_table_ptr, first, stop, block_stride, slot_stride, BLOCK_SIZE: gl.constexpr,
    layout: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """[KEYS, LANES]: where positions from `first` on lie in a layer's cache."""
    positions = _positions(first, layout, LANES)
    blocks = gl.load(block_table_ptr + positions // BLOCK_SIZE, mask=positions < stop, other=0)
    return blocks.to(gl.int64) * block_stride + positions % BLOCK_SIZE * slot_stride


@gluon.jit
def load_keys(
    k_ptr, v_ptr, offsets, first, stop, layout: gl.constexpr, LANES: gl.constexpr,
    DIM: gl.constexpr,
):  # fmt: skip
    """[KEYS, LANES, DIM] of a head's keys, and of its values."""
    dims = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    where = gl.multiple_of(offsets, (16, 16))[:, :, None] + dims[None, :][None, :, :]
    exists = (_positions(first, layout, LANES) < stop)[:, :, None]
    return (
        gl.load(k_ptr + where, mask=exists, other=0.0),
        gl.load(v_ptr + where, mask=exists, other=0.0),
    )


@gluon.jit
def _norm_heads(x, scale, weight):
    """float32, rounded twice as `rms_norm` does."""
    normed = (x.to(gl.float32) * scale[:, None]).to(x.dtype).to(gl.float32) * weight.to(gl.float32)
    return normed.to(x.dtype).to(gl.float32)


@gluon.jit
def _attend_keys(query, keys, values, exists, highest, total, acc):
    """Take KEYS x LANES positions in; each lane's sums are its own."""
    scores = gl.sum(keys.to(gl.float32) * query[None, :, :], 2)
    scores = gl.where(exists, scores, float("-inf"))
    higher = gl.maximum(highest, gl.max(scores, 0))
    base = gl.where(higher == float("-inf"), 0.0, higher)
    weights = gl.exp2(scores - base[None, :])
    shrink = gl.exp2(highest - base)
    total = total * shrink + gl.sum(weights, 0)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    acc = acc * shrink[:, None] + gl.sum(weights[:, :, None] * values.to(gl.float32), 0)
    return higher, total, acc


@gluon.jit
def attend(
    qkv_ptr,  # [QKV]: this layer's projection
    k_ptr,  # this layer's cache of the head, as v
    v_ptr,
    parts_ptr,  # see `decode_layers_kernel`
    weights_ptr,
    block_table_ptr,
    slot_offset,  # where the token's key and value go
    head,
    split,
    start,
    stop,
    is_last,  # whether the part ends with the token itself, whose key is not in the cache yet
    keys,  # [KEYS, LANES, DIM]: the part's first
    values,
    offsets,  # [KEYS, LANES]: where the next are
    head_norms,  # [TASK_HEADS, DIM]
    other_norms,
    cos,  # [1, DIM] float32
    sin,
    scale,
    eps,
    block_stride,
    slot_stride,
    lane_sums,  # shared: [GROUP, LANES, DIM] float32
    heads_tile,  # shared: [TASK_HEADS, DIM] float32
    lane_tops,  # shared: [2 * GROUP, LANES] float32
    own_scores,  # shared: [TASK_HEADS] float32
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    TASK_HEADS: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HAS_NORM: gl.constexpr,
    layout: gl.constexpr,  # of keys
    heads_layout: gl.constexpr,  # of heads, one for each warp
):
    """Norm, rotate and store the token's key, rotate its queries, and attend to one part."""
    LANES: gl.constexpr = TILE // DIM
    NUM_HEADS: gl.constexpr = GROUP * KV_HEADS
    lanes_layout: gl.constexpr = gl.SliceLayout(0, layout)
    lane_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    sums_layout: gl.constexpr = gl.BlockedLayout([LANES, 1], [1, 32], [1, 8], [1, 0])
    in_thread: gl.constexpr = gl.SliceLayout(1, sums_layout)
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty

    # A row for each query head, and after them one for the key.
    members = gl.arange(0, TASK_HEADS, gl.SliceLayout(1, heads_layout))[:, None]
    dims = gl.arange(0, DIM, gl.SliceLayout(0, heads_layout))[None, :]
    is_query = members < GROUP
    rows_ptr = qkv_ptr + gl.where(is_query, head * GROUP + members, NUM_HEADS + head) * DIM
    raw = gl.load(rows_ptr + dims, cache_modifier=".cg")
    raw_other = gl.load(rows_ptr + (dims + DIM // 2) % DIM, cache_modifier=".cg")
    value_dims = gl.arange(0, DIM, gl.SliceLayout(0, sums_layout))
    value_ptr = qkv_ptr + (NUM_HEADS + KV_HEADS + head) * DIM
    own_value = gl.load(value_ptr + value_dims, cache_modifier=".cg")
    if is_last:
        gl.store(v_ptr + slot_offset + value_dims, own_value)
    x = raw.to(gl.float32)
    other = raw_other.to(gl.float32)
    if HAS_NORM:
        root = gl.rsqrt(gl.sum(x * x, 1) / DIM + eps)
        x = _norm_heads(raw, root, head_norms)
        other = _norm_heads(raw_other, root, other_norms)
    rotated = (x * cos + other * sin).to(dtype)
    key_ptr = k_ptr + slot_offset + dims + members * 0
    gl.store(key_ptr, rotated, mask=(members == GROUP) & is_last)
    rotated = rotated.to(gl.float32) * gl.where(is_query, scale, 1.0)
    heads_tile.store(rotated)
    own_key = heads_tile.slice(GROUP, 1, 0).load(heads_layout)
    own_scores.store(gl.sum(rotated * own_key, 1))

    queries = ()
    sums = ()
    for member in gl.static_range(GROUP):
        queries += (heads_tile.slice(member, 1, 0).load(lanes_layout),)
        sums += (
            gl.full([LANES], float("-inf"), gl.float32, lane_layout),
            gl.full([LANES], 0.0, gl.float32, lane_layout),
            gl.full([LANES, DIM], 0.0, gl.float32, lanes_layout),
        )
    for first in range(start, stop, KEYS * LANES):
        next_keys, next_values = load_keys(
            k_ptr, v_ptr, offsets, first + KEYS * LANES, stop, layout, LANES, DIM
        )
        offsets = find_keys(
            block_table_ptr, first + 2 * KEYS * LANES, stop, block_stride, slot_stride, BLOCK_SIZE,
            layout, LANES,
        )  # fmt: skip
        exists = _positions(first, layout, LANES) < stop
        new_sums = ()
        for member in gl.static_range(GROUP):
            new_sums += _attend_keys(
                queries[member], keys, values, exists,
                sums[3 * member], sums[3 * member + 1], sums[3 * member + 2],
            )  # fmt: skip
        sums = new_sums
        keys = next_keys
        values = next_values

    # What each row of threads has summed up, and the token's own key, of each head in turn.
    for member in gl.static_range(GROUP):
        lane_tops.index(2 * member).store(sums[3 * member])
        lane_tops.index(2 * member + 1).store(sums[3 * member + 1])
        lane_sums.index(member).store(sums[3 * member + 2])
    all_own = own_scores.load(in_thread)
    own_index = gl.arange(0, TASK_HEADS, in_thread)
    for member in gl.static_range(GROUP):
        tops = lane_tops.index(2 * member).load(in_thread)
        totals = lane_tops.index(2 * member + 1).load(in_thread)
        own = gl.sum(gl.where(own_index == member, all_own, 0.0), 0)
        own = gl.where(is_last, own, float("-inf"))
        top = gl.maximum(gl.max(tops, 0), own)
        factors = gl.exp2(tops - top)
        own = gl.exp2(own - top)
        total = gl.sum(totals * factors, 0) + own
        acc = gl.sum(lane_sums.index(member).load(sums_layout) * factors[:, None], 0)
        acc += own * own_value.to(gl.float32)
        part = split * NUM_HEADS + head * GROUP + member
        gl.store(parts_ptr + part * DIM + value_dims, acc / total)
        gl.store(weights_ptr + part, top + gl.log2(total))


@gluon.jit
def _load_parts(
    parts_ptr, first, num_splits, layout: gl.constexpr, AT_ONCE: gl.constexpr, DIM: gl.constexpr,
    SIZE: gl.constexpr, BLOCK_K: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    heads = gl.arange(0, BLOCK_K // DIM, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    groups = gl.arange(0, DIM // WIDTH, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    within = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    cols = (heads[:, None] * DIM + groups[None, :] * WIDTH)[:, :, None]
    cols += within[None, :][None, :, :]
    loaded = ()
    for i in gl.static_range(AT_ONCE):
        for row in gl.static_range(SIZE // BLOCK_K):
            loaded += (
                gl.load(
                    parts_ptr + (first + i) * SIZE + row * BLOCK_K + cols,
                    mask=first + i < num_splits, other=0.0, cache_modifier=".cg",
                ),
            )  # fmt: skip
    return loaded


@gluon.jit
def stage_attended(
    vector, shares, parts_ptr, weights_ptr, num_splits, dtype: gl.constexpr, DIM: gl.constexpr,
    SIZE: gl.constexpr, BLOCK_K: gl.constexpr, MAX_SPLITS: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Parts of contexts put together."""
    NUM_ROWS: gl.constexpr = SIZE // BLOCK_K
    AT_ONCE: gl.constexpr = 8 // NUM_ROWS if NUM_ROWS < 8 else 1
    WIDTH: gl.constexpr = BLOCK_K // 256
    ACROSS: gl.constexpr = DIM // WIDTH  # threads
    IN_WARP: gl.constexpr = ACROSS if ACROSS < 32 else 32
    WARPS: gl.constexpr = ACROSS // IN_WARP
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, WIDTH], [32 // IN_WARP, IN_WARP, 1], [8 // WARPS, WARPS, 1], [2, 1, 0]
    )
    loaded = _load_parts(parts_ptr, 0, num_splits, layout, AT_ONCE, DIM, SIZE, BLOCK_K, WIDTH)

    # Each part's share of a head's result, by way of shared memory: each is read but once.
    by_part: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0])
    parts = gl.arange(0, MAX_SPLITS, gl.SliceLayout(1, by_part))[:, None]
    heads = gl.arange(0, PADDED, gl.SliceLayout(0, by_part))[None, :]
    weights = gl.load(
        weights_ptr + parts * (SIZE // DIM) + heads,
        mask=(parts < num_splits) & (heads < SIZE // DIM), other=float("-inf"),
        cache_modifier=".cg",
    )  # fmt: skip
    highest = gl.max(weights, 0)
    highest = gl.where(highest == float("-inf"), 0.0, highest)
    weights = gl.exp2(weights - highest[None, :])
    view(shares, [MAX_SPLITS, PADDED]).store(weights / gl.sum(weights, 0)[None, :])

    sums = ()
    for _row in gl.static_range(NUM_ROWS):
        sums += (gl.full([BLOCK_K // DIM, ACROSS, WIDTH], 0.0, gl.float32, layout),)
    for first in range(0, num_splits, AT_ONCE):
        more = _load_parts(
            parts_ptr, first + AT_ONCE, num_splits, layout, AT_ONCE, DIM, SIZE, BLOCK_K, WIDTH
        )  # fmt: skip
        new_sums = ()
        for row in gl.static_range(NUM_ROWS):
            acc = sums[row]
            for i in gl.static_range(AT_ONCE):
                part = gl.minimum(first + i, MAX_SPLITS - 1)
                share = shares.index(part * (PADDED * DIM // BLOCK_K) + row)
                share = share.load(gl.SliceLayout(2, layout))
                acc += loaded[i * NUM_ROWS + row] * share[:, :, None]
            new_sums += (acc,)
        sums = new_sums
        loaded = more
    for row in gl.static_range(NUM_ROWS):
        x = sums[row].to(dtype).to(gl.float32)
        vector.index(row).store(gl.reshape(x, [1, BLOCK_K]))
