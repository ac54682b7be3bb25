"""RMSNorm on a GPU: one program per token. See `octavo.kernels.norm`."""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels import launch


@triton.jit
def norm_kernel(
    x_ptr,  # [num_tokens, size], rows x_stride apart
    total_ptr,  # [num_tokens, size] contiguous: residual in, x + residual out
    weight_ptr,  # [size]
    out_ptr,  # [num_tokens, size] contiguous
    x_stride,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ADD_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(total_ptr + row * size + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(total_ptr + row * size + cols, rounded, mask=mask)
        x = rounded.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    if ADD_ONE:
        x *= 1.0 + weight
    else:
        x = x.to(dtype).to(tl.float32) * weight
    tl.store(out_ptr + row * size + cols, x.to(dtype), mask=mask)


def rms_norm(
    x: torch.Tensor,  # [num_tokens, size]
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    add_one: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual); the sum is written over the residual."""
    num_tokens, size = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    total = x if residual is None else residual.contiguous()
    if num_tokens:
        overlap = launch.overlaps(x)
        block = triton.next_power_of_2(size)
        norm_kernel[(num_tokens,)](
            x,
            total,
            weight,
            out,
            x.stride(0),
            size,
            eps,
            HAS_RESIDUAL=residual is not None,
            ADD_ONE=add_one,
            BLOCK=block,
            OVERLAP=overlap,
            **launch.options(overlap, num_warps=min(max(block // 512, 1), 8)),
        )
    return out, total
