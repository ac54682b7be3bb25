"""Gated activations on a GPU. See `octavo.kernels.activation`."""

# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, unused-ignore"
# ruff: noqa: ANN001, ANN201, ANN202, RUF100

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels import launch

# What the kernels call each activation.
KINDS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_pytorch_tanh": 2,
    "gelu_new": 2,
}


@triton.jit
def activate(x, KIND: tl.constexpr):
    """float32 in and out."""
    if KIND == 0:
        return x * tl.sigmoid(x)
    elif KIND == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh y) = sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gated_kernel(
    gate_up_ptr,  # [num_tokens, 2 * size], rows stride apart
    stride,
    size,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < size
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up_ptr + row * stride + cols, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + size + cols, mask=mask, other=0.0)
    activated = activate(gate.to(tl.float32), KIND).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(gate_up_ptr + row * stride + cols, product.to(gate.dtype), mask=mask)


def gated_activation(gate_up: torch.Tensor, name: str) -> torch.Tensor:
    """In place: the result is the first half of `gate_up`, which saves its memory."""
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    if num_tokens:
        overlap = launch.overlaps(gate_up)
        # Few tokens: small blocks, so that all processors have a part.
        block = 512 if num_tokens <= 8 else 1024
        gated_kernel[(num_tokens, triton.cdiv(size, block))](
            gate_up,
            gate_up.stride(0),
            size,
            KIND=KINDS[name],
            BLOCK=block,
            OVERLAP=overlap,
            **launch.options(overlap, num_warps=4),
        )
    return gate_up[:, :size]
