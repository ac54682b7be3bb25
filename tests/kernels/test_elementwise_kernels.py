"""Norm, activation, inputs of decodes, and from the packed projection to the cache, against their
twins.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.activation import ACTIVATIONS, gated_activation_torch
from octavo.kernels.decode_inputs import take_inputs_torch
from octavo.kernels.norm import rms_norm_torch
from octavo.kernels.qkv import HeadNorms, HeadTransform, rotate_and_store_torch
from octavo.kernels.rope import Rope


def assert_close(got, expected):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[got.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("add_one", [False, True])
@pytest.mark.parametrize("size", [64, 821, 2089])
def test_rms_norm(device, size, add_one, dtype):
    from octavo.kernels import norm_triton

    x, residual = torch.randn(2, 5, size, device=device).to(dtype)
    weight = torch.randn(size, device=device).to(dtype)
    expected = rms_norm_torch(x, weight, 1e-5, residual, add_one=add_one)
    got = norm_triton.rms_norm(x, weight, 1e-5, residual.clone(), add_one)
    assert torch.equal(got[1], expected[1])
    assert_close(got[0], expected[0])
    wide = torch.randn(5, 2 * size, device=device).to(dtype)[:, :size]
    got = norm_triton.rms_norm(wide, weight, 1e-5, None, add_one)
    assert_close(got[0], rms_norm_torch(wide, weight, 1e-5, add_one=add_one)[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", [96, 857])
def test_gated_activation(device, name, size):
    from octavo.kernels import activation_triton

    gate_up = 3 * torch.randn(3, 2 * size, device=device)
    got = activation_triton.gated_activation(gate_up.clone(), name)
    assert_close(got, gated_activation_torch(gate_up, name))


@pytest.mark.parametrize("norm", [None, False, True], ids=["plain", "norm", "norm-add-one"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rot_dim"),
    [(4, 2, 16, 16), (9, 3, 64, 64), (6, 1, 24, 24), (3, 3, 80, 32), (4, 4, 48, 16)],
)
@pytest.mark.parametrize("num_tokens", [3, 17])
def test_rotate_and_store(device, num_tokens, num_heads, num_kv_heads, head_dim, rot_dim, norm):
    from octavo.kernels import qkv_triton

    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device)
    table = torch.randn(50, rot_dim, device=device)
    rope = Rope(table, torch.randint(0, 50, (num_tokens,), device=device), qkv.dtype)
    norms = None
    if norm is not None:
        norms = HeadNorms(*torch.randn(2, head_dim, device=device), 1e-6, norm)
    transform = HeadTransform(rope, norms)
    slots = torch.randperm(40, device=device)[:num_tokens]
    caches = torch.full((2, 2, 10, 4, num_kv_heads, head_dim), float("nan"), device=device)
    expected = rotate_and_store_torch(qkv.clone(), num_heads, transform, *caches[0], slots)
    got = qkv_triton.rotate_and_store(qkv, num_heads, transform, *caches[1], slots)
    assert_close(got, expected.contiguous())
    torch.testing.assert_close(caches[1], caches[0], equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_rows", "max_blocks", "block_size"), [(9, 1, 16), (40, 1500, 8)])
def test_take_inputs(device, num_rows, max_blocks, block_size):
    from octavo.kernels import decode_inputs_triton

    scratch = num_rows - 1
    tables = torch.randint(1, 9999, (num_rows, max_blocks), device=device, dtype=torch.int32)
    computed = torch.randint(0, max_blocks * block_size, (num_rows,), device=device)
    tables[scratch], computed[scratch] = 0, 0
    rows = torch.randperm(scratch, device=device)[:7]
    rows = torch.cat((rows, torch.full((3,), scratch, device=device)))
    expected_computed = computed.clone()
    expected = take_inputs_torch(rows, expected_computed, tables, block_size)
    got = decode_inputs_triton.take_inputs(rows, computed, tables, block_size)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    assert torch.equal(computed, expected_computed)
    assert computed[scratch] == 0
