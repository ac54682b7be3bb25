"""Sampling without sorting. See `octavo.kernels.sampling`.

Moves: the logits, once for the greedy choice; for a draw as often as the search for the smallest
kept logit looks at them (each time it halves the interval, and it stops as soon as no logit lies
between its bounds: some 10 to 15 times for top_k or top_p), mostly from L2.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels import launch

_BLOCK = 4096


@triton.jit
def argmax_kernel(
    logits_ptr,  # [n, size], rows stride apart
    values_ptr,  # [n, num_parts] float32, out
    indices_ptr,  # [n, num_parts] int32, out
    stride,
    size,
    part_len,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    stop = tl.minimum((part + 1) * part_len, size)
    for start in tl.range(part * part_len, stop, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * stride + cols, mask=cols < stop, other=float("-inf"))
        x = x.to(tl.float32)
        where = tl.where(x > highest, cols, where)
        highest = tl.maximum(x, highest)
    value = tl.max(highest, 0)
    # Of equal ones the first.
    index = tl.min(tl.where(highest == value, where, 2147483647), 0)
    out = row * tl.num_programs(1) + part
    tl.store(values_ptr + out, value)
    tl.store(indices_ptr + out, index)


@triton.jit
def argmax_parts_kernel(
    values_ptr, indices_ptr, out_ptr, num_parts, PARTS: tl.constexpr, OVERLAP: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    mask = parts < num_parts
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    values = tl.load(values_ptr + row * num_parts + parts, mask=mask, other=float("-inf"))
    indices = tl.load(indices_ptr + row * num_parts + parts, mask=mask, other=2147483647)
    index = tl.min(tl.where(values == tl.max(values, 0), indices, 2147483647), 0)
    tl.store(out_ptr + row, index.to(tl.int64))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, position):
    """As `octavo.runner.random.uniforms`."""
    golden = tl.full([1], 0x9E3779B97F4A7C15, tl.uint64)
    state = _mix(seed.to(tl.uint64) + golden) + position.to(tl.uint64) * golden
    return tl.sum((_mix(state) >> 40).to(tl.float32), 0) * 5.960464477539063e-08


@triton.jit
def _scaled(row_ptr, start, size, highest, inverse, BLOCK: tl.constexpr):
    """Logits relative to the highest, divided by the temperature; -inf beyond the end."""
    cols = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + cols, mask=cols < size, other=float("-inf")).to(tl.float32)
    return (x - highest) * inverse


@triton.jit
def _measure(row_ptr, size, highest, inverse, threshold, BLOCK: tl.constexpr):
    """Of the logits from the threshold on: number, mass, lowest. Of those below: the highest."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    below = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, size, BLOCK):
        z = _scaled(row_ptr, start, size, highest, inverse, BLOCK)
        kept = z >= threshold
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp(z), 0.0)
        lowest = tl.minimum(lowest, tl.where(kept, z, float("inf")))
        below = tl.maximum(below, tl.where(kept, float("-inf"), z))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.min(lowest, 0), tl.max(below, 0)


@triton.jit
def _search(
    row_ptr, size, highest, inverse, low, count, mass, needed, BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest logit such that those from it on are `needed` many, or hold so much mass.

    `low` is a logit that is low enough, and `count` and `mass` what it keeps; returned for the
    result as well.
    """
    high = 1e-3  # above all of them
    going = True
    while going:
        middle = 0.5 * (low + high)
        num, total, lowest, below = _measure(row_ptr, size, highest, inverse, middle, BLOCK)
        if BY_COUNT:
            enough = num >= needed
            exact = num == needed
        else:
            enough = total >= needed
            exact = False
        going = (middle > low) & (middle < high)
        if enough & going:
            low = lowest
            count = num
            mass = total
            going = going & (exact == False)  # noqa: E712
        else:
            high = middle
            going = going & (below > low)
    return low, count, mass


@triton.jit(
    do_not_specialize_on_alignment=[
        "temperature_ptr",
        "top_k_ptr",
        "top_p_ptr",
        "min_p_ptr",
        "seeds_ptr",
        "positions_ptr",
    ]
)
def sample_kernel(
    logits_ptr,  # [n, size], rows stride apart
    temperature_ptr,  # [n] float32
    top_k_ptr,  # [n] int
    top_p_ptr,  # [n] float32
    min_p_ptr,  # [n] float32
    seeds_ptr,  # [n] int64
    positions_ptr,  # [n] int64
    out_ptr,  # [n] int64
    stride,
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < size, other=float("-inf")).to(tl.float32)
        where = tl.where(x > lanes, cols, where)
        lanes = tl.maximum(x, lanes)
    highest = tl.max(lanes, 0)
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        index = tl.min(tl.where(lanes == highest, where, 2147483647), 0)
        tl.store(out_ptr + row, index.to(tl.int64))
        return
    inverse = 1.0 / temperature
    min_p = tl.load(min_p_ptr + row)
    # Finite, so that what is forbidden (-inf) is never kept.
    floor = tl.where(min_p > 0.0, tl.log(tl.maximum(min_p, 1e-38)), -3.0e38)
    count, mass, low, _ = _measure(row_ptr, size, highest, inverse, floor, BLOCK)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    if (top_k > 0) & (top_k < count):
        low, count, mass = _search(
            row_ptr, size, highest, inverse, low, count, mass, top_k, True, BLOCK
        )
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1.0:
        low, count, mass = _search(
            row_ptr, size, highest, inverse, low, count, mass, top_p * mass, False, BLOCK
        )
    target = mass * _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    # Find the block in which the running sum passes the target; failing that by rounding, the last
    # that has any mass.
    passed = 0.0
    rest = 0.0
    block_start = 0
    found = False
    for start in tl.range(0, size, BLOCK):
        z = _scaled(row_ptr, start, size, highest, inverse, BLOCK)
        part = tl.sum(tl.where(z >= low, tl.exp(z), 0.0), 0)
        here = (found == False) & (part > 0.0)  # noqa: E712
        rest = tl.where(here, target - passed, rest)
        block_start = tl.where(here, start, block_start)
        passed += part
        found = found | (passed > target)
    z = _scaled(row_ptr, block_start, size, highest, inverse, BLOCK)
    weights = tl.where(z >= low, tl.exp(z), 0.0)
    index = tl.sum((tl.cumsum(weights, 0) <= rest).to(tl.int32), 0)
    last = tl.max(tl.where(weights > 0.0, tl.arange(0, BLOCK), 0), 0)
    tl.store(out_ptr + row, (block_start + tl.minimum(index, last)).to(tl.int64))


@triton.jit
def logprob_kernel(
    logits_ptr,  # [n, size], rows stride apart
    ids_ptr,  # [n] int64
    out_ptr,  # [n] float32
    stride,
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    highest = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + cols, mask=cols < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    most = tl.max(highest, 0)
    mass = tl.sum(total * tl.exp(highest - most), 0)
    chosen = tl.load(row_ptr + tl.load(ids_ptr + row)).to(tl.float32)
    tl.store(out_ptr + row, chosen - most - tl.log(mass))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[n, vocab] -> [n] int64; of equal logits the first."""
    n, size = logits.shape
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    if not n:
        return out
    block = min(_BLOCK, triton.next_power_of_2(size))
    wanted = triton.cdiv(2 * launch.num_processors(logits.device), n)
    num_blocks = triton.cdiv(size, block)
    part_blocks = triton.cdiv(num_blocks, min(wanted, num_blocks))
    num_parts = triton.cdiv(num_blocks, part_blocks)
    values = torch.empty((n, num_parts), dtype=torch.float32, device=logits.device)
    indices = torch.empty((n, num_parts), dtype=torch.int32, device=logits.device)
    overlap = launch.overlaps(logits)
    how = {"OVERLAP": overlap, **launch.options(overlap, num_warps=8)}
    stride = logits.stride(0)
    argmax_kernel[(n, num_parts)](
        logits, values, indices, stride, size, part_blocks * block, BLOCK=block, **how
    )
    parts = max(triton.next_power_of_2(num_blocks), 2)
    how = {"OVERLAP": overlap, **launch.options(overlap, num_warps=1)}
    argmax_parts_kernel[(n,)](values, indices, out, num_parts, PARTS=parts, **how)
    return out


def sample(
    logits: torch.Tensor,  # [n, vocab] float, last dimension contiguous
    temperature: torch.Tensor,  # [n] float32; 0: the most likely token
    top_k: torch.Tensor,  # [n] int; 0: all
    top_p: torch.Tensor,  # [n] float32
    min_p: torch.Tensor,  # [n] float32
    seeds: torch.Tensor,  # [n] int64
    positions: torch.Tensor,  # [n] int64, where each sampled token will stand
) -> torch.Tensor:  # [n] int64
    """One launch for rows of every kind. A token as likely as the last that top_k keeps is kept,
    too.
    """
    n, size = logits.shape
    out = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n:
        parameters = (temperature, top_k, top_p, min_p, seeds, positions)
        block = min(_BLOCK, triton.next_power_of_2(size))
        how = launch.options(False, num_warps=16 if block == _BLOCK else 4)
        stride = logits.stride(0)
        sample_kernel[(n,)](logits, *parameters, out, stride, size, BLOCK=block, **how)
    return out


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[n, vocab], [n] int64 -> [n] float32: log-probability of each row's token."""
    n, size = logits.shape
    out = torch.empty(n, dtype=torch.float32, device=logits.device)
    if n:
        block = min(_BLOCK, triton.next_power_of_2(size))
        how = launch.options(False, num_warps=8)
        logprob_kernel[(n,)](logits, token_ids, out, logits.stride(0), size, BLOCK=block, **how)
    return out
