"""Products with few tokens, and what is fused with them, against the twin."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.linear import Around, linear_around_torch


def arounds(num_tokens, out_features, in_features, device):
    norm = torch.rand(in_features, device=device) + 0.5
    residual = torch.randn(num_tokens, out_features, device=device)
    return {
        "plain": Around(),
        "norm-residual": Around(norm=norm, eps=1e-3, residual=residual),
        "gemma-norm": Around(norm=norm, eps=1e-3, add_one=True),
        "silu": Around(activation="silu", residual=residual),
    }


@pytest.mark.parametrize("name", ["plain", "norm-residual", "gemma-norm", "silu"])
@pytest.mark.parametrize("shape", [(31, 821), (64, 2048), (20, 256)])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7, 16])
def test_product(device, num_tokens, shape, name):
    from octavo.kernels import gemv_triton

    if name == "silu" and num_tokens > gemv_triton.MAX_GEMV_TOKENS:
        pytest.skip("activations are fused for few tokens only")
    around = arounds(num_tokens, *shape, device)[name]
    x = torch.randn(num_tokens, shape[1] * (2 if around.activation else 1), device=device)
    weight = torch.randn(shape, device=device) / shape[1] ** 0.5
    bias = torch.randn(shape[0], device=device) if name != "silu" else None
    plan = gemv_triton.plan(num_tokens, *shape)
    if num_tokens > gemv_triton.MAX_GEMV_TOKENS:
        plan = gemv_triton.SkinnyPlan(32, 64, 4, 2)
    got = gemv_triton.run(plan, x, weight, bias, around)
    expected = linear_around_torch(x, weight, bias, around)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_every_row_is_written_once(device):
    """A plan per number of rows; the result is poisoned by NaN where nothing is written."""
    from octavo.kernels import gemv_triton

    x, weight = torch.randn(1, 512, device=device), torch.randn(37, 512, device=device)
    for rows in (1, 2, 4, 8):
        plan = gemv_triton.GemvPlan(rows, 256, 4)
        got = gemv_triton.run(plan, x, weight, None, Around())
        torch.testing.assert_close(got, x @ weight.T, atol=1e-4, rtol=1e-4)
