"""All layers of a decoder for one token, in one launch. See `octavo.kernels.decode_layers`.

Bytes: every weight of the layers once, and the context's keys and values. One program per processor
stays for all layers. Weights do not depend on what is computed, so a program copies its share of
them to shared memory through a ring, across the borders of products and layers: while programs wait
for each other, five times a layer, the next weights are on their way.

Written in Gluon, Triton's lower level, which has no interpreter: its twin, the layers one by one,
is checked on a GPU only.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from octavo.kernels import decode_layers
from octavo.kernels.activation_triton import activate
from octavo.kernels.decode_attention_hopper import (
    KEYS,
    TILE,
    attend,
    find_keys,
    load_keys,
    stage_attended,
    view,
)

# Two names of Gluon's, which is not yet settled, from before and after.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_copy_tile = (
    async_copy.async_load
    if hasattr(async_copy, "async_load")
    else async_copy.async_copy_global_to_shared
)
ROWS = gl.constexpr(decode_layers.ROWS)
UNIT = gl.constexpr(decode_layers.UNIT)
COLUMNS = gl.constexpr(decode_layers.COLUMNS)  # of the table of distances
_FIELDS = decode_layers.LayerTensors._fields
_QKV = gl.constexpr(_FIELDS.index("qkv"))
_OUT = gl.constexpr(_FIELDS.index("out"))
_GATE_UP = gl.constexpr(_FIELDS.index("gate_up"))
_DOWN = gl.constexpr(_FIELDS.index("down"))
_INPUT_NORM = gl.constexpr(_FIELDS.index("input_norm"))
_POST_NORM = gl.constexpr(_FIELDS.index("post_norm"))
_QUERY_NORM = gl.constexpr(_FIELDS.index("query_norm"))
_KEY_NORM = gl.constexpr(_FIELDS.index("key_norm"))
_QKV_BIAS = gl.constexpr(_FIELDS.index("qkv_bias"))
_KEYS = gl.constexpr(_FIELDS.index("keys"))
_VALUES = gl.constexpr(_FIELDS.index("values"))


@gluon.jit
def _arrive(counter_ptr):
    """Say that what this program has written can be read."""
    _barrier()
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred p;
            .reg .u32 v;
            mov.u32 v, %tid.x;
            setp.eq.u32 p, v, 0;
            @p red.release.gpu.global.add.u32 [$1], 1;
            mov.u32 $0, 0;
        }
        """,
        "=r,l",
        [counter_ptr],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _wait_for(counter_ptr, target):
    """Go on when so many have arrived."""
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred p;
            .reg .u32 v;
            mov.u32 v, %tid.x;
            setp.ne.u32 p, v, 0;
            @p bra done;
        wait:
            ld.acquire.gpu.global.u32 v, [$1];
            setp.lt.u32 p, v, $2;
            @p bra wait;
        done:
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [counter_ptr, target],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    _barrier()


@gluon.jit
def _pointer(base_ptr, offsets_ptr, column: gl.constexpr):
    """Of a layer's tensor."""
    return base_ptr + gl.load(offsets_ptr + column).to(gl.int64) * UNIT


@gluon.jit
def _copy_tiles(
    tile, start_ptr, ring, ready, free,
    NUM_ROWS: gl.constexpr, SIZE: gl.constexpr, APART: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This program's tiles of one weight, each as soon as its place in the ring is free. Unless
    APART is 0, the second half of a tile's rows begins so many rows after the first half.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [1, 1], [1, 0])
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    STEP: gl.constexpr = ROWS if APART == 0 else ROWS // 2
    if APART > 0:
        rows = gl.where(rows < STEP, rows, rows + (APART - STEP))
    pointers = start_ptr + (rows[:, None] * SIZE + cols[None, :])
    for block in range(gl.program_id(0), NUM_ROWS // ROWS, gl.num_programs(0)):
        for step in range(SIZE // BLOCK_K):
            slot = tile % STAGES
            mbarrier.wait(free.index(slot), (tile // STAGES & 1) ^ 1)
            offset = block.to(gl.int64) * (STEP * SIZE) + step * BLOCK_K
            _copy_tile(ring.index(slot), pointers + offset)
            async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)
            tile += 1
    return tile


@gluon.jit
def _copy(
    weight_ptr, table_ptr, num_layers, ring, ready, free,
    HIDDEN: gl.constexpr, HEADS: gl.constexpr, QKV: gl.constexpr, INNER: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All weights of this program, layer by layer, through the ring."""
    tile = 0
    for layer in range(num_layers):
        offsets_ptr = table_ptr + layer * COLUMNS
        qkv_ptr = _pointer(weight_ptr, offsets_ptr, _QKV)
        out_ptr = _pointer(weight_ptr, offsets_ptr, _OUT)
        gate_up_ptr = _pointer(weight_ptr, offsets_ptr, _GATE_UP)
        down_ptr = _pointer(weight_ptr, offsets_ptr, _DOWN)
        tile = _copy_tiles(
            tile, qkv_ptr, ring, ready, free, QKV, HIDDEN, 0, BLOCK_K, STAGES
        )  # fmt: skip
        tile = _copy_tiles(
            tile, out_ptr, ring, ready, free, HIDDEN, HEADS, 0, BLOCK_K, STAGES
        )  # fmt: skip
        tile = _copy_tiles(
            tile, gate_up_ptr, ring, ready, free, 2 * INNER, HIDDEN, INNER, BLOCK_K, STAGES
        )  # fmt: skip
        tile = _copy_tiles(
            tile, down_ptr, ring, ready, free, HIDDEN, INNER, 0, BLOCK_K, STAGES
        )  # fmt: skip


@gluon.jit
def _load_rows(
    source_ptr, NUM_ROWS: gl.constexpr, BLOCK_K: gl.constexpr, cache_modifier: gl.constexpr
):
    """NUM_ROWS x BLOCK_K elements in a row, as they are staged."""
    layout: gl.constexpr = gl.BlockedLayout([1, BLOCK_K // 256], [1, 32], [1, 8], [1, 0])
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))[None, :]
    loaded = ()
    for row in gl.static_range(NUM_ROWS):
        here = source_ptr + row * BLOCK_K + cols
        loaded += (gl.load(here, cache_modifier=cache_modifier),)
    return loaded


@gluon.jit
def _stage_normed(vector, source_ptr, norm, eps, SIZE: gl.constexpr, BLOCK_K: gl.constexpr):
    """What stands before a product, to shared memory, but for the division by the root, which is
    returned.
    """
    source = _load_rows(source_ptr, SIZE // BLOCK_K, BLOCK_K, ".cg")
    squares = source[0].to(gl.float32) * source[0].to(gl.float32)
    for row in gl.static_range(SIZE // BLOCK_K):
        x = source[row].to(gl.float32)
        if row > 0:
            squares += x * x
        vector.index(row).store(x * norm[row].to(gl.float32))
    return gl.rsqrt(gl.sum(gl.sum(squares, 1), 0) / SIZE + eps)


@gluon.jit
def _stage(vector, source_ptr, SIZE: gl.constexpr, BLOCK_K: gl.constexpr):
    source = _load_rows(source_ptr, SIZE // BLOCK_K, BLOCK_K, ".cg")
    for row in gl.static_range(SIZE // BLOCK_K):
        vector.index(row).store(source[row].to(gl.float32))


@gluon.jit
def _take_tile(tile, ring, ready, free, layout: gl.constexpr, STAGES: gl.constexpr):
    """The next tile of weights, whose place is free again."""
    slot = tile % STAGES
    mbarrier.wait(ready.index(slot), tile // STAGES & 1)
    weight = ring.index(slot).load(layout)
    mbarrier.arrive(free.index(slot), count=1)
    return weight


@gluon.jit
def _multiply(
    tile, vector, ring, ready, free, scale, bias_ptr, residual_ptr, out_ptr,
    NUM_ROWS: gl.constexpr, SIZE: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This program's rows of the product; the number of the next tile. With an activation, a tile
    has rows of the gate and as many of what it gates.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [ROWS, 1], [1, 0])
    STEPS: gl.constexpr = SIZE // BLOCK_K
    x = vector.index(0).load(layout)
    num_blocks = NUM_ROWS // ROWS
    if gl.program_id(0) < num_blocks:
        weight = _take_tile(tile, ring, ready, free, layout, STAGES)
    else:
        weight = gl.full([ROWS, BLOCK_K], 0.0, ring.dtype, layout)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        rows = block * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        if HAS_RESIDUAL:
            residual = gl.load(residual_ptr + rows, cache_modifier=".cg")
        acc = gl.full([ROWS, BLOCK_K], 0.0, gl.float32, layout)
        for step in range(STEPS):
            if STEPS > 1:
                x = vector.index(step).load(layout)
            # The next tile is fetched from shared memory while this one is summed up.
            current = weight
            tile += 1
            if (step + 1 < STEPS) | (block + gl.num_programs(0) < num_blocks):
                weight = _take_tile(tile, ring, ready, free, layout, STAGES)
            acc += current.to(gl.float32) * x
        y = gl.sum(acc, 1) * scale
        if HAS_BIAS:
            y += gl.load(bias_ptr + rows).to(gl.float32)
        if HAS_RESIDUAL:
            y = y.to(residual.dtype).to(gl.float32) + residual.to(gl.float32)
        dtype: gl.constexpr = out_ptr.dtype.element_ty
        if ACTIVATION >= 0:
            pairs: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [8, 1], [1, 0])
            both = gl.permute(gl.reshape(y.to(dtype), [2, ROWS // 2]), (1, 0))
            gate, up = gl.split(gl.convert_layout(both, pairs))
            gated = activate(gate.to(gl.float32), ACTIVATION).to(dtype).to(gl.float32)
            rows = block * (ROWS // 2) + gl.arange(0, ROWS // 2, gl.SliceLayout(1, pairs))
            gl.store(out_ptr + rows, (gated * up.to(gl.float32)).to(dtype))
        else:
            gl.store(out_ptr + rows, y.to(dtype))
    return tile


@gluon.jit
def _compute(
    x_ptr, weight_ptr, table_ptr, block_table_ptr, seq_len_ptr, slot_ptr, rope_ptr, between_ptr,
    parts_ptr, weights_ptr, counters_ptr, num_layers, block_stride, slot_stride, scale,
    eps, ring, vector, heads_tile, lane_tops, own_scores, shares, ready, free,
    HIDDEN: gl.constexpr, INNER: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr,
    DIM: gl.constexpr, MAX_SPLITS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_HEAD_NORMS: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    PADDED: gl.constexpr, TASK_HEADS: gl.constexpr,
):  # fmt: skip
    """All but the weights' copies."""
    HEADS: gl.constexpr = GROUP * KV_HEADS * DIM
    QKV: gl.constexpr = HEADS + 2 * KV_HEADS * DIM
    LANES: gl.constexpr = TILE // DIM
    layout: gl.constexpr = gl.BlockedLayout(
        [KEYS, 1, 8], [1, 256 // DIM, DIM // 8], [1, 8, 1], [2, 1, 0]
    )
    heads_layout: gl.constexpr = gl.BlockedLayout([1, DIM // 32], [1, 32], [8, 1], [1, 0])
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    lane_sums = view(vector, [GROUP, LANES, DIM])
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    mid_ptr = between_ptr
    qkv_ptr = mid_ptr + HIDDEN
    gated_ptr = qkv_ptr + QKV

    # The part of the context that falls to this program, if any.
    seq_len = gl.maximum(gl.load(seq_len_ptr), 1)  # 0 is padding
    STEP: gl.constexpr = KEYS * LANES
    split_len = (seq_len + MAX_SPLITS * STEP - 1) // (MAX_SPLITS * STEP) * STEP
    num_splits = (seq_len + split_len - 1) // split_len
    attends = program < KV_HEADS * num_splits
    head = gl.where(attends, program // num_splits, 0)
    split = gl.where(attends, program % num_splits, 0)
    is_last = split == num_splits - 1
    start = split * split_len
    stop = gl.minimum(start + split_len, seq_len - 1)  # the last key is not in the cache yet
    stop = gl.where(attends, stop, start)
    slot = gl.load(slot_ptr)
    slot_offset = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride

    first_offsets = find_keys(
        block_table_ptr, start, stop, block_stride, slot_stride, BLOCK_SIZE, layout, LANES
    )  # fmt: skip
    second_offsets = find_keys(
        block_table_ptr, start + STEP, stop, block_stride, slot_stride, BLOCK_SIZE, layout,
        LANES,
    )  # fmt: skip

    dims = gl.arange(0, DIM, gl.SliceLayout(0, heads_layout))[None, :]
    others = (dims + DIM // 2) % DIM
    is_query = gl.arange(0, TASK_HEADS, gl.SliceLayout(1, heads_layout))[:, None] < GROUP
    angle_ptr = rope_ptr + (seq_len - 1).to(gl.int64) * DIM + dims % (DIM // 2)
    cos = gl.load(angle_ptr)
    sin = gl.load(angle_ptr + DIM // 2) * gl.where(dims < DIM // 2, -1.0, 1.0)

    tile = 0
    target = num_programs
    norm = _load_rows(_pointer(weight_ptr, table_ptr, _INPUT_NORM), HIDDEN // BLOCK_K, BLOCK_K, "")
    for layer in range(num_layers):
        # Looked up early: what the programs write makes each processor forget what it has read.
        offsets_ptr = table_ptr + layer * COLUMNS
        post_norm_ptr = _pointer(weight_ptr, offsets_ptr, _POST_NORM)
        q_norm_ptr = _pointer(weight_ptr, offsets_ptr, _QUERY_NORM)
        k_norm_ptr = _pointer(weight_ptr, offsets_ptr, _KEY_NORM)
        bias_ptr = _pointer(weight_ptr, offsets_ptr, _QKV_BIAS)
        k_ptr = _pointer(weight_ptr, offsets_ptr, _KEYS) + head * DIM
        v_ptr = _pointer(weight_ptr, offsets_ptr, _VALUES) + head * DIM
        next_ptr = gl.where(layer + 1 < num_layers, offsets_ptr + COLUMNS, offsets_ptr)
        next_norm_ptr = _pointer(weight_ptr, next_ptr, _INPUT_NORM)
        factor = _stage_normed(vector, x_ptr, norm, eps, HIDDEN, BLOCK_K)
        tile = _multiply(
            tile, vector, ring, ready, free, factor, bias_ptr, x_ptr, qkv_ptr,
            QKV, HIDDEN, HAS_BIAS, False, -1, BLOCK_K, STAGES,
        )  # fmt: skip
        _arrive(counters_ptr)
        # What needs nothing of the projection is loaded while the others are waited for.
        keys, values = load_keys(
            k_ptr, v_ptr, first_offsets, start, stop, layout, LANES, DIM
        )  # fmt: skip
        if HAS_HEAD_NORMS:
            head_norms = gl.where(is_query, gl.load(q_norm_ptr + dims), gl.load(k_norm_ptr + dims))
            other_norms = gl.where(
                is_query, gl.load(q_norm_ptr + others), gl.load(k_norm_ptr + others)
            )
        else:
            head_norms = cos
            other_norms = cos
        _wait_for(counters_ptr, target)
        if attends:
            attend(
                qkv_ptr, k_ptr, v_ptr, parts_ptr, weights_ptr, block_table_ptr, slot_offset, head,
                split, start, stop, is_last, keys, values, second_offsets, head_norms, other_norms,
                cos, sin, scale, eps, block_stride, slot_stride, lane_sums, heads_tile, lane_tops,
                own_scores, GROUP, KV_HEADS, TASK_HEADS, DIM, BLOCK_SIZE, HAS_HEAD_NORMS,
                layout, heads_layout,
            )  # fmt: skip
        _arrive(counters_ptr)
        norm = _load_rows(post_norm_ptr, HIDDEN // BLOCK_K, BLOCK_K, "")
        _wait_for(counters_ptr, target + num_programs)
        stage_attended(
            vector, shares, parts_ptr, weights_ptr, num_splits, dtype, DIM, HEADS, BLOCK_K,
            MAX_SPLITS, PADDED,
        )  # fmt: skip
        tile = _multiply(
            tile, vector, ring, ready, free, 1.0, weight_ptr, x_ptr, mid_ptr,
            HIDDEN, HEADS, False, True, -1, BLOCK_K, STAGES,
        )  # fmt: skip
        _arrive(counters_ptr)
        _wait_for(counters_ptr, target + 2 * num_programs)
        factor = _stage_normed(vector, mid_ptr, norm, eps, HIDDEN, BLOCK_K)
        tile = _multiply(
            tile, vector, ring, ready, free, factor, weight_ptr, x_ptr, gated_ptr,
            2 * INNER, HIDDEN, False, False, ACTIVATION, BLOCK_K, STAGES,
        )  # fmt: skip
        _arrive(counters_ptr)
        _wait_for(counters_ptr, target + 3 * num_programs)
        _stage(vector, gated_ptr, INNER, BLOCK_K)
        tile = _multiply(
            tile, vector, ring, ready, free, 1.0, weight_ptr, mid_ptr, x_ptr,
            HIDDEN, INNER, False, True, -1, BLOCK_K, STAGES,
        )  # fmt: skip
        _arrive(counters_ptr)
        norm = _load_rows(next_norm_ptr, HIDDEN // BLOCK_K, BLOCK_K, "")
        _wait_for(counters_ptr, target + 4 * num_programs)
        target += 5 * num_programs
    # Who leaves last clears the counters for the next launch.
    if gl.atomic_add(counters_ptr + 1, 1, sem="acq_rel", scope="gpu") == num_programs - 1:
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)


@gluon.jit(do_not_specialize=["num_layers"])
def decode_layers_kernel(
    x_ptr,  # [HIDDEN]: the token's hidden state, which becomes that after the last layer
    weight_ptr,  # the first layer's q-k-v weight; `table` has offsets from there
    table_ptr,  # [num_layers, COLUMNS] int32, in UNITs of `decode_layers`
    block_table_ptr,  # [max_blocks] int32
    seq_len_ptr,  # [1] int32, this token included
    slot_ptr,  # [1] int64
    rope_ptr,  # [max_model_len, DIM] float32: cos, then sin
    between_ptr,  # [HIDDEN + QKV + INNER]: results of products
    parts_ptr,  # [MAX_SPLITS, HEADS] float32: attention to parts of the context
    weights_ptr,  # [MAX_SPLITS, HEADS / DIM] float32
    counters_ptr,  # [2] int32, both 0 and left so
    num_layers,
    block_stride,
    slot_stride,
    scale,  # of the scores, times log2(e)
    eps,
    HIDDEN: gl.constexpr,
    INNER: gl.constexpr,
    GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr,
    DIM: gl.constexpr,
    MAX_SPLITS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,  # of the cache
    HAS_BIAS: gl.constexpr,
    HAS_HEAD_NORMS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    BLOCK_K: gl.constexpr,
    VECTOR: gl.constexpr,
    STAGES: gl.constexpr,
    PADDED: gl.constexpr,
    TASK_HEADS: gl.constexpr,
):
    HEADS: gl.constexpr = GROUP * KV_HEADS * DIM
    QKV: gl.constexpr = HEADS + 2 * KV_HEADS * DIM
    LANES: gl.constexpr = TILE // DIM
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], flat)
    vector = gl.allocate_shared_memory(gl.float32, [VECTOR // BLOCK_K, 1, BLOCK_K], flat)
    heads_tile = gl.allocate_shared_memory(gl.float32, [TASK_HEADS, DIM], flat)
    lane_tops = gl.allocate_shared_memory(gl.float32, [2 * GROUP, LANES], flat1)
    own_scores = gl.allocate_shared_memory(gl.float32, [TASK_HEADS], flat1)
    shares = gl.allocate_shared_memory(
        gl.float32, [MAX_SPLITS * PADDED * DIM // BLOCK_K, BLOCK_K // DIM, 1], flat
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # Each thread of the copying warp arrives when its copies have; the warps that multiply have
        # all read a tile before one arrives for them.
        mbarrier.init(ready.index(stage), count=32)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (
                x_ptr, weight_ptr, table_ptr, block_table_ptr, seq_len_ptr, slot_ptr, rope_ptr,
                between_ptr, parts_ptr, weights_ptr, counters_ptr, num_layers,
                block_stride, slot_stride, scale, eps, ring, vector, heads_tile, lane_tops,
                own_scores, shares, ready, free,
                HIDDEN, INNER, GROUP, KV_HEADS, DIM, MAX_SPLITS, BLOCK_SIZE, HAS_BIAS,
                HAS_HEAD_NORMS, ACTIVATION, BLOCK_K, STAGES, PADDED,
                TASK_HEADS,
            )),
            (_copy, (
                weight_ptr, table_ptr, num_layers, ring, ready, free,
                HIDDEN, HEADS, QKV, INNER, BLOCK_K, STAGES,
            )),
        ],
        [1],  # warps of the second
        [64],  # their registers per thread
    )  # fmt: skip
