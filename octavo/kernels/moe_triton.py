"""Mixture of experts on a GPU, without a word to the host. See `octavo.kernels.moe`.

A pair is a token and one of its experts: pair p belongs to token p // top_k. Pairs are grouped by
expert by a counting sort; a program of the grouped product takes some pairs of one expert, which it
finds by binary search over where each expert's pairs start. With few tokens hardly two pairs share
an expert: then each pair is a group of its own, and nothing is sorted.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, attr-defined, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels import launch
from octavo.kernels.activation_triton import KINDS, activate

# Up to so many pairs are not sorted.
MAX_LOOSE_PAIRS = 32


class GroupedPlan(NamedTuple):
    block_m: int  # pairs
    block_n: int  # output columns
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def route_kernel(
    logits_ptr,  # [num_tokens, num_experts], rows stride apart
    weights_ptr,  # [num_tokens, top_k] float32, out
    experts_ptr,  # [num_tokens, top_k] int32, out
    stride,
    num_experts,
    top_k,
    RENORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,  # top_k, rounded up to a power of two
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    mask = experts < num_experts
    x = tl.load(logits_ptr + token * stride + experts, mask=mask, other=float("-inf"))
    x = x.to(tl.float32)
    left = tl.exp(x - tl.max(x, 0))
    mass = tl.sum(left, 0)
    ranks = tl.arange(0, TOP)
    weights = tl.zeros([TOP], tl.float32)
    chosen = tl.zeros([TOP], tl.int32)
    for rank in tl.range(0, top_k):
        best = tl.max(left, 0)
        # Logits that are no numbers equal nothing; their token's results are lost, no one else's.
        expert = tl.minimum(tl.min(tl.where(left == best, experts, BLOCK), 0), num_experts - 1)
        weights = tl.where(ranks == rank, best, weights)
        chosen = tl.where(ranks == rank, expert, chosen)
        left = tl.where(experts == expert, -1.0, left)
    if RENORMALISE:
        mass = tl.sum(weights, 0)
    kept = ranks < top_k
    tl.store(weights_ptr + token * top_k + ranks, weights / mass, mask=kept)
    tl.store(experts_ptr + token * top_k + ranks, chosen, mask=kept)


@triton.jit(do_not_specialize=["num_pairs"])
def sort_kernel(
    experts_ptr,  # [num_pairs] int32
    order_ptr,  # [num_pairs] int32, out: pairs by expert
    starts_ptr,  # [num_experts + 1] int32, out: where each expert's pairs start
    num_pairs,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program per expert: counts the pairs of those before it, then lines up its own."""
    expert = tl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    before = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        ids = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=2147483647)
        before += (ids < expert).to(tl.int32)
    position = tl.sum(before, 0)
    tl.store(starts_ptr + expert, position)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts_ptr + expert + 1, num_pairs)
    for start in tl.range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        ids = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=2147483647)
        mine = (ids == expert).to(tl.int32)
        tl.store(order_ptr + position + tl.cumsum(mine, 0) - 1, pairs, mask=mine > 0)
        position += tl.sum(mine, 0)


@triton.jit(do_not_specialize=["top_k"])
def grouped_kernel(
    x_ptr,  # GATED: [num_tokens, in_features], rows x_stride apart; else as this left it
    weight_ptr,  # [num_experts, out_features (twice that if GATED), in_features] contiguous
    tiles,  # descriptor of the same as a matrix, tiles [BLOCK_N, BLOCK_K], or None
    x_tiles,  # descriptor of x, tiles [BLOCK_M, BLOCK_K], or None; not GATED, SORTED
    out_ptr,  # [num_pairs, out_features] contiguous; GATED and SORTED: in the sorted order
    experts_ptr,  # [num_pairs] int32
    order_ptr,  # [num_pairs] int32, SORTED
    starts_ptr,  # [num_experts + 1] int32, SORTED
    factors_ptr,  # [num_pairs] float32, not GATED: what each result is multiplied by
    x_stride,
    top_k,
    num_experts,
    out_features,
    in_features,
    GATED: tl.constexpr,  # act(x @ gate.T) * (x @ up.T), gate and up one after the other
    ACTIVATION: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # Neighbours share their pairs and their expert, which so are read from memory once.
    tile = tl.program_id(1)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    lanes = tl.arange(0, BLOCK_M)
    if SORTED:
        # Expert e's tiles start at starts[e] // BLOCK_M + e: no two overlap, and some are empty.
        expert = 0
        high = num_experts
        while high - expert > 1:
            middle = (expert + high) // 2
            if tl.load(starts_ptr + middle) // BLOCK_M + middle <= tile:
                expert = middle
            else:
                high = middle
        start = tl.load(starts_ptr + expert)
        first = start + (tile - start // BLOCK_M - expert) * BLOCK_M
        stop = tl.load(starts_ptr + expert + 1)
        if first >= stop:
            return
        exists = first + lanes < stop
        pairs = tl.load(order_ptr + first + lanes, mask=exists, other=0)
        places = first + lanes
    else:
        expert = tl.load(experts_ptr + tile)
        exists = lanes < 1
        pairs = tile + lanes * 0
        places = pairs
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(cols, out_features - 1)  # beyond the last: not written
    ks = tl.arange(0, BLOCK_K)
    num_rows = out_features
    x_rows = places
    if GATED:
        num_rows = 2 * out_features
        x_rows = pairs // top_k
    first_row = expert * num_rows + tl.program_id(0) * BLOCK_N
    x_tile = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride + ks[None, :]
    matrix = weight_ptr + expert.to(tl.int64) * num_rows * in_features
    weight_tile = matrix + rows[:, None] * in_features + ks[None, :]
    up_tile = weight_tile + out_features * in_features
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_acc = acc
    for k in tl.range(0, in_features, BLOCK_K):
        if EVEN_K:
            if x_tiles is None:
                x = tl.load(x_tile + k, mask=exists[:, None], other=0.0)
            else:
                x = x_tiles.load([first, k])
            if tiles is None:
                weight = tl.load(weight_tile + k)
            else:
                weight = tiles.load([first_row, k])
        else:
            in_k = (k + ks < in_features)[None, :]
            x = tl.load(x_tile + k, mask=exists[:, None] & in_k, other=0.0)
            weight = tl.load(weight_tile + k, mask=in_k, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        if GATED:
            if tiles is not None:
                up = tiles.load([first_row + out_features, k])
            elif EVEN_K:
                up = tl.load(up_tile + k)
            else:
                up = tl.load(up_tile + k, mask=(k + ks < in_features)[None, :], other=0.0)
            up_acc = tl.dot(x, tl.trans(up), up_acc, input_precision="ieee")
    dtype = out_ptr.dtype.element_ty
    if GATED:
        activated = activate(acc.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
        y = activated * up_acc.to(dtype).to(tl.float32)
        out_rows = places
    else:
        y = acc * tl.load(factors_ptr + pairs, mask=exists, other=0.0)[:, None]
        out_rows = pairs
    out = out_ptr + out_rows.to(tl.int64)[:, None] * out_features + cols[None, :]
    tl.store(out, y.to(dtype), mask=exists[:, None] & (cols < out_features)[None, :])


@triton.jit
def combine_kernel(
    y_ptr,  # [num_tokens, top_k, size] contiguous
    residual_ptr,  # [num_tokens, size] contiguous
    out_ptr,  # [num_tokens, size] contiguous
    top_k,
    size,
    HAS_RESIDUAL: tl.constexpr,
    TOP: tl.constexpr,  # top_k, rounded up to a power of two
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    ranks = tl.arange(0, TOP)
    y_rows = y_ptr + (token * top_k + ranks)[:, None] * size
    y = tl.load(y_rows + cols[None, :], mask=(ranks < top_k)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(y.to(tl.float32), 0)
    dtype = out_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * size + cols, mask=mask, other=0.0)
        total = total.to(dtype).to(tl.float32) + residual.to(tl.float32)
    tl.store(out_ptr + token * size + cols, total.to(dtype), mask=mask)


def route(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_tokens, num_experts] -> weights float32 and experts int32, [num_tokens, top_k] each."""
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    if num_tokens:
        overlap = launch.overlaps(logits)
        route_kernel[(num_tokens,)](
            logits,
            weights,
            experts,
            logits.stride(0),
            num_experts,
            top_k,
            RENORMALISE=renormalise,
            BLOCK=triton.next_power_of_2(num_experts),
            TOP=triton.next_power_of_2(top_k),
            OVERLAP=overlap,
            **launch.options(overlap, num_warps=1),
        )
    return weights, experts


def group(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs by expert, and where each expert's start; within an expert in their own order."""
    num_pairs = experts.numel()
    order = torch.empty(num_pairs, dtype=torch.int32, device=experts.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    overlap = launch.overlaps(experts)
    # On an H100, 8,192 pairs take 16 us in blocks of 2,048 and 26 in blocks of 4,096; 65,536 take
    # 41 in blocks of 8,192 and 77 in blocks of 4,096.
    block = 2048 if num_pairs <= 8192 else 8192
    block = min(max(triton.next_power_of_2(num_pairs), 16), block)
    how = {
        "BLOCK": block,
        "OVERLAP": overlap,
        **launch.options(overlap, num_warps=min(max(block // 256, 1), 16)),
    }
    sort_kernel[(num_experts,)](experts, order, starts, num_pairs, **how)
    return order, starts


def choose_plan(
    num_pairs: int, num_experts: int, itemsize: int, gated: bool, *, copies_tiles: bool = True
) -> GroupedPlan:
    """By how many pairs an expert has on average. What copies tiles has more shared memory."""
    if itemsize == 4:
        return GroupedPlan(16, 32, 32, 4, 2)
    if num_pairs <= MAX_LOOSE_PAIRS and not launch.is_amd():
        return GroupedPlan(16, 32, 256, 2, 4 if gated else 3)
    if num_pairs <= 6 * num_experts:
        return GroupedPlan(16, 32 if gated else 64, 128, 4, 3)
    if launch.is_amd():
        return GroupedPlan(64, 64, 64, 4, 2)
    if num_pairs <= 24 * num_experts:
        return GroupedPlan(32, 64 if gated else 128, 128, 4, 3)
    if num_pairs <= 64 * num_experts:
        return GroupedPlan(64, 128, 64, 4, 4)
    if not copies_tiles:
        return GroupedPlan(128, 128, 64, 8, 3)
    return GroupedPlan(128, 128 if gated else 256, 64, 8, 4)


def run_experts(
    x: torch.Tensor,  # [num_tokens, size]
    gate_up: torch.Tensor,  # [num_experts, 2 * intermediate, size] contiguous
    down: torch.Tensor,  # [num_experts, size, intermediate] contiguous
    weights: torch.Tensor,  # [num_tokens, top_k] float32
    experts: torch.Tensor,  # [num_tokens, top_k] int32
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # [num_tokens, size]
    """The weighted sum over each token's experts of down(act(gate(x)) * up(x)), plus residual."""
    num_tokens, top_k = experts.shape
    num_experts, size, intermediate = down.shape
    num_pairs = num_tokens * top_k
    if not num_pairs:
        return torch.empty_like(x) if residual is None else residual
    grouping = None if num_pairs <= MAX_LOOSE_PAIRS else group(experts, num_experts)
    gated = torch.empty((num_pairs, intermediate), dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    _multiply(x, gate_up, gated, experts, grouping, None, top_k, KINDS[activation])
    y = torch.empty((num_pairs, size), dtype=x.dtype, device=x.device)
    _multiply(gated, down, y, experts, grouping, weights, 1, None)
    return _combine(y, residual, num_tokens, top_k)


def _combine(
    y: torch.Tensor, residual: torch.Tensor | None, num_tokens: int, top_k: int
) -> torch.Tensor:
    """[num_tokens * top_k, size] -> [num_tokens, size]"""
    size = y.shape[1]
    out = torch.empty((num_tokens, size), dtype=y.dtype, device=y.device)
    overlap = launch.overlaps(y)
    block = min(triton.next_power_of_2(size), 256 if num_tokens <= 32 else 1024)
    combine_kernel[(num_tokens, triton.cdiv(size, block))](
        y,
        y if residual is None else residual.contiguous(),
        out,
        top_k,
        size,
        HAS_RESIDUAL=residual is not None,
        TOP=triton.next_power_of_2(top_k),
        BLOCK=block,
        OVERLAP=overlap,
        **launch.options(overlap, num_warps=4),
    )
    return out


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    experts: torch.Tensor,
    grouping: tuple[torch.Tensor, torch.Tensor] | None,
    factors: torch.Tensor | None,
    top_k: int,
    activation: int | None,
    plan: GroupedPlan | None = None,
) -> None:
    """One grouped product; with an activation, of gate and up."""
    num_pairs, out_features = out.shape
    num_experts, _, in_features = weight.shape
    gated, copies_tiles = activation is not None, launch.copies_tiles(x.device)
    plan = plan or choose_plan(
        num_pairs, num_experts, x.element_size(), gated, copies_tiles=copies_tiles
    )
    if grouping is None:
        num_tiles, order, starts = num_pairs, experts, experts
    else:
        num_tiles, (order, starts) = num_pairs // plan.block_m + num_experts, grouping
    tiles = x_tiles = None
    if plan.block_m >= 64 and copies_tiles and in_features % plan.block_k == 0:
        matrix = weight.view(-1, in_features)
        tiles = TensorDescriptor.from_tensor(matrix, [plan.block_n, plan.block_k])
        if not gated and grouping is not None:
            x_tiles = TensorDescriptor.from_tensor(x, [plan.block_m, plan.block_k])
    overlap = launch.overlaps(x)
    grouped_kernel[(triton.cdiv(out_features, plan.block_n), num_tiles)](
        x,
        weight,
        tiles,
        x_tiles,
        out,
        experts,
        order,
        starts,
        x if factors is None else factors,
        x.stride(0),
        top_k,
        num_experts,
        out_features,
        in_features,
        GATED=gated,
        ACTIVATION=activation or 0,
        SORTED=grouping is not None,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        EVEN_K=in_features % plan.block_k == 0,
        OVERLAP=overlap,
        **launch.options(overlap, plan.num_warps, plan.num_stages),
    )
