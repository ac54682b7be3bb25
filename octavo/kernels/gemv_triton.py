"""Products of a weight with few rows, bound by the weight's bytes. See `octavo.kernels.linear`.

Two kernels: up to MAX_GEMV_TOKENS rows are multiplied element by element in float32, each program
reading some whole rows of the weight (one token, all of Qwen3 8B on an H100: 5.4 ms against 5.7 ms
with cuBLAS); up to MAX_SKINNY_TOKENS go through the tensor cores, the weight as the tall operand.

An RMSNorm costs next to nothing here: its weight goes into the product, the sum of squares is
collected along the way, and the result is divided by the root at the end.
"""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from octavo.kernels import launch
from octavo.kernels.activation_triton import KINDS, activate
from octavo.kernels.linear import Around

MAX_GEMV_TOKENS = 4
MAX_SKINNY_TOKENS = 64
# Several tokens go through the tensor cores from so many elements of the weight on.
MIN_SKINNY_ELEMENTS = 16 << 20
# Below so many programs of the tensor-core kernel, cuBLAS, which splits the sum, is better.
MIN_SKINNY_PROGRAMS = 96
# Each program of a fused activation computes all of it: only where that is little in all.
MAX_ACTIVATED = 4 << 20


class GemvPlan(NamedTuple):
    rows: int  # of the weight per program
    block_k: int  # columns per iteration
    num_warps: int


class SkinnyPlan(NamedTuple):
    block_n: int  # rows of the weight per program
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _read(
    x_ptr,  # one token's row; with an activation, gate then up
    norm_ptr,
    cols,
    in_features,
    HAS_NORM: tl.constexpr,
    ADD_ONE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """(what the weight is multiplied by, the input itself), [BLOCK_K] float32 each."""
    if EVEN_K:
        raw = tl.load(x_ptr + cols)
    else:
        raw = tl.load(x_ptr + cols, mask=cols < in_features, other=0.0)
    x = raw.to(tl.float32)
    factor = x
    if ACTIVATION >= 0:
        if EVEN_K:
            up = tl.load(x_ptr + in_features + cols).to(tl.float32)
        else:
            up = tl.load(x_ptr + in_features + cols, mask=cols < in_features, other=0.0)
            up = up.to(tl.float32)
        factor = (activate(x, ACTIVATION).to(raw.dtype).to(tl.float32) * up).to(raw.dtype)
        factor = factor.to(tl.float32)
    if HAS_NORM:
        weight = tl.load(norm_ptr + cols, mask=cols < in_features, other=0.0).to(tl.float32)
        if ADD_ONE:
            weight += 1.0
        factor = x * weight
    return factor, x


@triton.jit
def _finish(
    acc,  # [ROWS, BLOCK_K]
    squares,  # [BLOCK_K]
    token,
    rows,
    bias_ptr,
    residual_ptr,
    out_ptr,
    out_features,
    in_features,
    eps,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    y = tl.sum(acc, 1)
    exists = rows < out_features
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares, 0) / in_features + eps)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=exists, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * out_features + rows, mask=exists, other=0.0)
        y = y.to(residual.dtype).to(tl.float32) + residual.to(tl.float32)
    tl.store(out_ptr + token * out_features + rows, y.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def gemv_kernel(
    x_ptr,  # [TOKENS, in_features], rows x_stride apart
    weight_ptr,  # [out_features, in_features] contiguous
    bias_ptr,  # [out_features]
    norm_ptr,  # [in_features]
    residual_ptr,  # [TOKENS, out_features] contiguous
    out_ptr,  # as residual
    x_stride,
    out_features,
    in_features,
    eps,
    TOKENS: tl.constexpr,  # 1 to 4
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ADD_ONE: tl.constexpr,
    ACTIVATION: tl.constexpr,  # as activation_triton.KINDS, -1: none
    HAS_RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + rows.to(tl.int64)[:, None] * in_features
    inside = (rows < out_features)[:, None]
    # No kernel before this one writes weights: the first are on their way before the wait.
    weight = tl.load(
        weight_rows + cols[None, :], mask=inside & (cols < in_features)[None, :], other=0.0
    )
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc0 = tl.zeros([ROWS, BLOCK_K], tl.float32)
    squares0 = tl.zeros([BLOCK_K], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    squares1 = squares0
    squares2 = squares0
    squares3 = squares0
    for k in tl.range(0, in_features, BLOCK_K):
        here = k + cols
        later = here + BLOCK_K
        wide = weight.to(tl.float32)
        weight = tl.load(
            weight_rows + later[None, :], mask=inside & (later < in_features)[None, :], other=0.0
        )
        factor, x = _read(x_ptr, norm_ptr, here, in_features, HAS_NORM, ADD_ONE, ACTIVATION, EVEN_K)
        acc0 += wide * factor[None, :]
        squares0 += x * x
        if TOKENS > 1:
            factor, x = _read(
                x_ptr + x_stride, norm_ptr, here, in_features, HAS_NORM, ADD_ONE, ACTIVATION, EVEN_K
            )
            acc1 += wide * factor[None, :]
            squares1 += x * x
        if TOKENS > 2:
            x2_ptr = x_ptr + 2 * x_stride
            factor, x = _read(
                x2_ptr, norm_ptr, here, in_features, HAS_NORM, ADD_ONE, ACTIVATION, EVEN_K
            )
            acc2 += wide * factor[None, :]
            squares2 += x * x
        if TOKENS > 3:
            x3_ptr = x_ptr + 3 * x_stride
            factor, x = _read(
                x3_ptr, norm_ptr, here, in_features, HAS_NORM, ADD_ONE, ACTIVATION, EVEN_K
            )
            acc3 += wide * factor[None, :]
            squares3 += x * x
    _finish(
        acc0, squares0, 0, rows, bias_ptr, residual_ptr, out_ptr, out_features, in_features, eps,
        HAS_NORM, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    if TOKENS > 1:
        _finish(
            acc1, squares1, 1, rows, bias_ptr, residual_ptr, out_ptr, out_features, in_features,
            eps, HAS_NORM, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    if TOKENS > 2:
        _finish(
            acc2, squares2, 2, rows, bias_ptr, residual_ptr, out_ptr, out_features, in_features,
            eps, HAS_NORM, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    if TOKENS > 3:
        _finish(
            acc3, squares3, 3, rows, bias_ptr, residual_ptr, out_ptr, out_features, in_features,
            eps, HAS_NORM, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def skinny_kernel(
    x_ptr,  # [num_tokens, in_features], rows x_stride apart
    weight_ptr,  # [out_features, in_features] contiguous
    bias_ptr,  # [out_features]
    norm_ptr,  # [in_features]
    residual_ptr,  # [num_tokens, out_features] contiguous
    out_ptr,  # as residual
    x_stride,
    num_tokens,
    out_features,
    in_features,
    eps,
    TOKENS: tl.constexpr,  # num_tokens, padded to what a matrix product takes
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_K)
    # Rows beyond the last are read as the last, and not written.
    last = tl.minimum(rows, out_features - 1).to(tl.int64)
    weight_tile = weight_ptr + last[:, None] * in_features + cols[None, :]
    x_tile = x_ptr + tokens[:, None] * x_stride + cols[None, :]
    is_token = (tokens < num_tokens)[:, None]
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for k in tl.range(0, in_features, BLOCK_K):
        in_k = (k + cols < in_features)[None, :]
        weight = tl.load(weight_tile + k, mask=in_k, other=0.0)
        x = tl.load(x_tile + k, mask=is_token & in_k, other=0.0)
        if HAS_NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            factor = tl.load(norm_ptr + k + cols, mask=k + cols < in_features, other=0.0)
            factor = factor.to(tl.float32)
            if ADD_ONE:
                factor += 1.0
            x = (wide * factor[None, :]).to(weight.dtype)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    y = tl.trans(acc)
    mask = is_token & (rows < out_features)[None, :]
    if HAS_NORM:
        y *= tl.rsqrt(squares / in_features + eps)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=rows < out_features, other=0.0).to(tl.float32)[None, :]
    offsets = tokens[:, None] * out_features + rows[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        y = y.to(residual.dtype).to(tl.float32) + residual.to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def plan(num_tokens: int, out_features: int, in_features: int) -> GemvPlan | SkinnyPlan | None:
    """How to multiply by a weight of this shape; None: better not here."""
    if num_tokens == 0 or in_features < 256:
        return None
    is_large = out_features * in_features >= MIN_SKINNY_ELEMENTS
    if num_tokens == 1 or (num_tokens <= MAX_GEMV_TOKENS and not is_large):
        return plan_gemv(num_tokens, out_features, in_features)
    return plan_skinny(num_tokens, out_features, in_features)


def plan_skinny(num_tokens: int, out_features: int, in_features: int) -> SkinnyPlan | None:
    """On an H100, 4096 x 4096: 14.5 us for 16 tokens (cuBLAS 16.6), 24576 x 4096: 69 (73), for 64
    tokens 73 (75), but 4096 x 12288: 41.6 (40.2).
    """
    if num_tokens > MAX_SKINNY_TOKENS or in_features % 8 or in_features > 2 * out_features:
        return None
    num_stages = 2 if launch.is_amd() else 4
    if out_features * in_features >= MIN_SKINNY_ELEMENTS:
        if num_tokens > 16 and out_features <= in_features:
            return None
        return SkinnyPlan(64, 128, 4, num_stages)
    if num_tokens > 16 or triton.cdiv(out_features, 32) < MIN_SKINNY_PROGRAMS:
        return None
    return SkinnyPlan(32, 256, 4, num_stages)


def plan_gemv(num_tokens: int, out_features: int, in_features: int) -> GemvPlan:
    """8 KiB of the weight per iteration (less for several tokens, whose sums take registers), and
    fewer rows where the programs would not fill the GPU.
    """
    block_k = 2048 if in_features % 2048 == 0 else 1024
    block_k = min(block_k, triton.next_power_of_2(in_features))
    budget = 4096 if num_tokens <= 2 else 2048
    rows = max(budget // block_k, 1)
    while rows > 1 and triton.cdiv(out_features, rows) < 528:
        rows //= 2
    return GemvPlan(rows, block_k, 4)


def fuses_activation(num_tokens: int, out_features: int, in_features: int) -> bool:
    """Whether the activation should be part of the product."""
    if num_tokens > MAX_GEMV_TOKENS:
        return False
    rows = plan_gemv(num_tokens, out_features, in_features).rows
    num_programs: int = triton.cdiv(out_features, rows)
    return num_programs * in_features * num_tokens <= MAX_ACTIVATED


def run(
    plan: GemvPlan | SkinnyPlan,
    x: torch.Tensor,  # [num_tokens, in_features], or twice as wide with an activation
    weight: torch.Tensor,  # [out_features, in_features] contiguous
    bias: torch.Tensor | None,
    around: Around,
) -> torch.Tensor:  # [num_tokens, out_features]
    """x @ weight.T, with what stands around it."""
    num_tokens, (out_features, in_features) = len(x), weight.shape
    out = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    overlap = launch.overlaps(x)
    tensors = (
        x if x.stride(1) == 1 else x.contiguous(),
        weight,
        x if bias is None else bias,
        x if around.norm is None else around.norm,
        x if around.residual is None else around.residual,
        out,
    )
    flags = {
        "HAS_BIAS": bias is not None,
        "HAS_NORM": around.norm is not None,
        "ADD_ONE": around.add_one,
        "HAS_RESIDUAL": around.residual is not None,
        "OVERLAP": overlap,
    }
    stride = tensors[0].stride(0)
    if isinstance(plan, GemvPlan):
        assert num_tokens <= MAX_GEMV_TOKENS
        gemv_kernel[(triton.cdiv(out_features, plan.rows),)](
            *tensors,
            stride,
            out_features,
            in_features,
            around.eps,
            TOKENS=num_tokens,
            ROWS=plan.rows,
            BLOCK_K=plan.block_k,
            EVEN_K=in_features % plan.block_k == 0,
            ACTIVATION=-1 if around.activation is None else KINDS[around.activation],
            **flags,
            **launch.options(overlap, plan.num_warps),
        )
        return out
    if around.activation is not None:
        raise ValueError("the tensor-core kernel takes no activation")
    skinny_kernel[(triton.cdiv(out_features, plan.block_n),)](
        *tensors,
        stride,
        num_tokens,
        out_features,
        in_features,
        around.eps,
        TOKENS=max(triton.next_power_of_2(num_tokens), 16),
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        **flags,
        **launch.options(overlap, plan.num_warps, plan.num_stages),
    )
    return out
