"""The native CPU kernels, in every instruction set that this CPU has, against plain torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from octavo.kernels import activation, norm, rope
from octavo.kernels.argmax import argmax
from octavo.kernels.cpu import library, ops

pytestmark = pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler")

KINDS = list(ops.KINDS)


@pytest.fixture(params=["generic", "avx2", "avxvnni", "avx512", "amx", "neon"])
def isa(request):
    if not library.use_isa(request.param):
        pytest.skip("this CPU lacks it")
    library.set_threads(2)
    with ops.in_charge():
        yield request.param
    library.set_threads(1)
    library.use_isa("")


def blocks_of(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in a block format, and what its blocks stand for."""
    blocks = quantize(weight.numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(blocks), torch.from_numpy(
        dequantize(blocks, GGMLQuantizationType[kind])
    )


def rounded(x: torch.Tensor, in_pairs: bool) -> torch.Tensor:
    """Activations as the kernels see them: 8 bits, a scale per 32. AVX2 has 16 bits for a pair of
    products with 8-bit weights.
    """
    groups = x.reshape(len(x), -1, ops.GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    if in_pairs:
        pairs = groups.unflatten(-1, (-1, 2))
        sums = torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1))
        scale = torch.maximum(scale, sums.amax(-1, keepdim=True) / 128)
    steps = (groups * torch.where(scale > 0, 1 / scale, 0.0)).round()
    return (steps * scale).reshape(x.shape)


# Digests of a packed matrix of each kind, by the vectors' lanes, and of 8 bits by whether signs are
# flipped. Where one changes, so must PACKING_VERSION of csrc/native.h: packed weights are kept on
# disk.
PACKED = {
    (4, "Q4_0"): "bf46bb42cf40103d",
    (4, "Q4_1"): "3bb0323b6968b257",
    (4, "Q8_0"): "146d64fdeac07ee3",
    (8, "Q4_0"): "8f61b536672f9632",
    (8, "Q4_1"): "c28942c34439360c",
    (8, "Q8_0", "flipped"): "c71b8ca1210ec2d9",
    (16, "Q4_0"): "e594cc54b3d9089d",
    (16, "Q4_1"): "6540a764db6faeb1",
    (16, "Q8_0", "flipped"): "276fd502bf4c272e",
}
LANES = {"generic": 4, "neon": 4, "avx2": 8, "avxvnni": 8, "avx512": 16, "amx": 16}


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_packed_bytes_needs_another_version(isa, kind):
    numbers = torch.arange(37 * 96).reshape(37, 96)
    if kind == "Q8_0":
        blocks = ops.to_q8_0((numbers * 37 % 255 - 127) / 64)
    else:
        blocks = (numbers[:, : 3 * ops.BLOCK_BYTES[kind]] * 37 % 251).to(torch.uint8)
    matrix = ops.PackedMatrix(kind, 37, 96)
    matrix.fill(blocks)
    digest = hashlib.sha256(matrix.packed.numpy()).hexdigest()[:16]
    is_flipped = kind == "Q8_0" and isa in ("avx2", "avxvnni", "avx512", "amx")
    assert digest == PACKED[(LANES[isa], kind, *["flipped"] * is_flipped)]
    assert library.isa() == isa
    assert library.packing() == {"amx": "avx512-2"}.get(isa, f"{isa}-2")


def test_a_matrix_of_bytes_that_are_there_already():
    first = ops.PackedMatrix("Q8_0", 37, 96)
    first.fill(ops.to_q8_0(torch.randn(37, 96)))
    second = ops.PackedMatrix("Q8_0", 37, 96, first.packed.clone())
    x = torch.randn(3, 96)
    assert torch.equal(first.multiply(x), second.multiply(x))
    with pytest.raises(ValueError, match="bytes"):
        ops.PackedMatrix("Q8_0", 37, 96, first.packed[:-1])
    with pytest.raises(ValueError, match="bytes"):
        ops.PackedMatrix("Q4_0", 37, 96, first.packed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out", "size"), [(1, 32), (37, 64), (96, 576), (101, 1536)])
def test_matrix(isa, kind, out, size):
    torch.manual_seed(out)
    blocks, weight = blocks_of(kind, torch.randn(out, size) / 20)
    matrix = ops.PackedMatrix(kind, out, size)
    cut = out // 3  # not on a panel's edge
    matrix.fill(blocks[cut:], cut)
    matrix.fill(blocks[:cut])
    x, bias = torch.randn(29, size), torch.randn(out)
    x[3], x[4, :40] = 0.0, 1e-30
    got = matrix.multiply(x, bias)
    torch.testing.assert_close(
        got, rounded(x, isa == "avx2" and kind == "Q8_0") @ weight.T + bias, atol=1e-2, rtol=0
    )
    torch.testing.assert_close(got, x @ weight.T + bias, atol=0.1, rtol=0)
    assert torch.equal(matrix.multiply(x[:, :]), matrix.multiply(x, torch.zeros(out)))
    ids = torch.tensor([out - 1, 0, out // 2])
    torch.testing.assert_close(matrix.lookup(ids), weight[ids], atol=1e-6, rtol=1e-6)
    with pytest.raises(IndexError):
        matrix.lookup(torch.tensor([out]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out", "size"), [(1, 32), (37, 64), (33, 96), (96, 576), (101, 1536)])
def test_matrix_times_prompts(isa, kind, out, size):
    """In bfloat16 where there are tiles, else as everything else."""
    torch.manual_seed(out)
    blocks, weight = blocks_of(kind, torch.randn(out, size) / 20)
    matrix = ops.PackedMatrix(kind, out, size)
    matrix.fill(blocks)
    bias = torch.randn(out)
    for num_rows in (1, 16, 17, 61):
        x = torch.randn(num_rows, 2 * size)[:, size:]
        x[0], x[-1, :3] = 1e30, torch.tensor([0.0, 1e-42, -0.0])
        got = matrix.multiply(x, bias, is_prompt=True)
        if isa != "amx":
            assert torch.equal(got, matrix.multiply(x, bias))
            continue
        short = [y.bfloat16().double() for y in (x, weight)]
        expected = (short[0] @ short[1].T + bias).float()
        torch.testing.assert_close(got[1:], expected[1:], atol=2e-5, rtol=0)
        torch.testing.assert_close(got[0], expected[0], atol=1e25, rtol=0)
        assert torch.equal(
            matrix.multiply(x, is_prompt=True), matrix.multiply(x, 0 * bias, is_prompt=True)
        )


def test_inputs_that_fill_no_group(isa):
    weight, x = torch.randn(21, 50), torch.randn(18, 50)
    matrix = ops.PackedMatrix("Q8_0", 21, 50)
    matrix.fill(ops.to_q8_0(weight))
    for is_prompt in (False, True):
        got = matrix.multiply(x, is_prompt=is_prompt)
        torch.testing.assert_close(got, x @ weight.T, atol=0.5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values_do_not_overflow(isa, kind):
    """All products at their largest, of either sign."""
    blocks, _ = blocks_of(kind, torch.ones(3, 64))
    raw = blocks.numpy().reshape(3, 2, -1)
    raw[..., :2] = np.array([1.0], np.float16).view(np.uint8)
    if kind == "Q8_0":
        raw[0, :, 2:], raw[1, :, 2:], raw[2, :, 2:] = 0x80, 127, 0x81  # -128, 127, -127
        q = torch.tensor([-128.0, 127, -127])
    else:
        raw[0, :, -16:], raw[1, :, -16:], raw[2, :, -16:] = 0xFF, 0x00, 0x77
        q = torch.tensor([15.0, 0, 7]) - (8 if kind == "Q4_0" else 0)
        if kind == "Q4_1":
            raw[..., 2:4] = 0
    matrix = ops.PackedMatrix(kind, 3, 64)
    matrix.fill(torch.from_numpy(raw.reshape(3, -1)))
    for sign in (1.0, -1.0):
        got = matrix.multiply(torch.full((9, 64), sign))
        torch.testing.assert_close(got, (q * sign * 64).expand(9, 3), atol=0.01, rtol=1e-5)


def test_neighbours_of_any_size_do_not_overflow(isa):
    """At the largest weights, whose products with two activations may have but 16 bits."""
    torch.manual_seed(0)
    weight = torch.tensor([1.0, -1.0]).unsqueeze(1).expand(2, 64)
    matrix = ops.PackedMatrix("Q8_0", 2, 64)
    matrix.fill(ops.to_q8_0(weight.contiguous()))
    x = torch.rand(500, 64) * torch.tensor([1.0, -1.0]).repeat(250).unsqueeze(1)
    x[100:, ::2] *= 30  # one of two is nearly all of their sum
    expected = rounded(x, isa == "avx2") @ weight.T
    torch.testing.assert_close(matrix.multiply(x), expected, atol=0, rtol=2e-3)


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch(isa, kind, is_prompt):
    torch.manual_seed(0)
    blocks, _ = blocks_of(kind, torch.randn(77, 608))  # long enough for tiles of few rows
    matrix = ops.PackedMatrix(kind, 77, 608)
    matrix.fill(blocks)
    x = torch.randn(301, 608)
    whole = matrix.multiply(x, is_prompt=is_prompt)
    parts = ((1, 0, 1), (2, 300, 1), (1, 5, 3), (2, 7, 13), (1, 40, 16), (3, 1, 17), (3, 100, 150))
    for num_threads, start, num in parts:
        library.set_threads(num_threads)
        got = matrix.multiply(x[start : start + num], is_prompt=is_prompt)
        assert torch.equal(got, whole[start : start + num])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float_weights_become_eight_bits(isa, dtype):
    weight = (torch.randn(7, 50) / 50).to(dtype)
    weight[2] = 0
    matrix = ops.PackedMatrix("Q8_0", 7, 50)
    matrix.fill(ops.to_q8_0(weight))
    got = matrix.lookup(torch.arange(7))
    assert ((got - weight.float()).abs() <= weight.abs().amax().float() / 200).all()
    x = torch.randn(2, 50)
    torch.testing.assert_close(matrix.multiply(x), x @ weight.float().T, atol=0.02, rtol=0)
    full = torch.randn(9, 96).to(dtype)  # as the reference rounds, but for ties
    expected = torch.from_numpy(quantize(full.float().numpy(), GGMLQuantizationType.Q8_0))
    difference = ops.to_q8_0(full).view(torch.int8).int() - expected.view(torch.int8).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("size", [1, 7, 33, 576])
@pytest.mark.parametrize("add_one", [False, True])
def test_norm(isa, size, add_one):
    x, residual, weight = torch.randn(5, size), torch.randn(5, size), torch.randn(size)
    expected = norm.rms_norm_torch(x, weight, 1e-5, residual, add_one=add_one)
    got = norm.rms_norm(x, weight, 1e-5, residual.clone(), add_one=add_one)
    torch.testing.assert_close(got[0], expected[0], atol=2e-6, rtol=2e-6)
    assert torch.equal(got[1], expected[1])
    heads = torch.randn(3, 4, size)[:, 1:3]
    torch.testing.assert_close(
        norm.rms_norm(heads, weight, 1e-5, add_one=add_one)[0],
        norm.rms_norm_torch(heads, weight, 1e-5, add_one=add_one)[0],
        atol=2e-6,
        rtol=2e-6,
    )


@pytest.mark.parametrize("rot_dim", [6, 32, 64])
def test_rotation_of_some_heads(isa, rot_dim):
    heads = torch.randn(5, 7, 64)
    cos = torch.randn(5, 1, rot_dim // 2).repeat(1, 1, 2)
    sin = torch.randn(5, 1, rot_dim // 2)
    sin = torch.cat((-sin, sin), dim=-1)
    expected = rope.rotate_torch(heads[:, 1:4], cos, sin)
    rest = heads[:, 4:].clone()
    got = rope.rotate(heads[:, 1:4], cos, sin)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(heads[:, 4:], rest)


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
@pytest.mark.parametrize("size", [5, 821])
def test_gated_activation(isa, name, size):
    gate_up = torch.randn(6, 2 * size) * 4
    gate_up[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    torch.testing.assert_close(
        activation.gated_activation(gate_up, name),
        activation.gated_activation_torch(gate_up, name),
        atol=5e-6,
        rtol=2e-5,
    )


def test_what_is_no_number_stays_none(isa):
    """At any place of a group, in activations and in weights, and in its own row only."""
    bad = torch.ones(128, 64)
    bad[torch.arange(0, 128, 2), torch.arange(64)] = torch.nan
    good = torch.ones(20, 64)
    for x, weight in ((bad, good), (good, bad)):
        matrix = ops.PackedMatrix("Q8_0", *weight.shape)
        matrix.fill(ops.to_q8_0(weight))
        got = matrix.multiply(x)
        got = got if x is bad else got.T
        assert got[::2].isnan().all()
        torch.testing.assert_close(got[1::2], torch.full((64, 20), 64.0), rtol=2e-3, atol=0)


def test_argmax_takes_the_first_of_equals(isa):
    logits = torch.randn(4, 4099)
    logits[0] = -torch.inf
    logits[1, [70, 2000]] = 9.0
    logits[2, -1] = 9.0
    logits[3, 50] = torch.nan
    assert torch.equal(argmax(logits), logits.argmax(dim=-1))


def test_only_where_the_native_kernels_are_in_charge():
    x = torch.zeros(2, 8)
    assert not ops.takes(x)
    with ops.in_charge():
        assert ops.takes(x)
        assert not ops.takes(x.bfloat16())
        assert not ops.takes(x.T)
    assert not ops.takes(x)


def test_there_is_one_openmp_runtime_at_most():
    if not (maps := Path("/proc/self/maps")).exists():
        pytest.skip("no /proc")
    files = {line.split()[-1] for line in maps.read_text().splitlines()}
    assert len([file for file in files if "omp" in Path(file).name]) <= 1
