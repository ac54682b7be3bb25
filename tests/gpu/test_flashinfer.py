"""FlashInfer's kernels against float32 attention in torch; unused parts of caches are NaN."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.paged import PagedCache

from octavo.attention import AttentionBackend, AttentionSpec, TorchAttention, get_backend
from octavo.attention.base import PackedAttention, PreparedAttention
from octavo.kernels.qkv import HeadTransform, split_and_rotate
from octavo.kernels.rope import Rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("flashinfer") is None, reason="needs octavo[flashinfer]"
    ),
]

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = {
    "four-64": (AttentionSpec(8, 2, 64, 0.125), FP16),
    "three-128": (AttentionSpec(6, 2, 128, 0.09), BF16),
    "window": (AttentionSpec(4, 1, 64, 0.125, sliding_window=37), FP16),
    "softcap": (AttentionSpec(4, 4, 64, 0.125, logit_softcap=5.0), FP16),
    "window-softcap": (AttentionSpec(2, 1, 64, 0.25, sliding_window=200, logit_softcap=5.0), BF16),
}
STEPS = {  # chunks of sequences 0 to 2 have a context of 1, 700 and 130 tokens; how many decode
    "fresh": ([(3, 1), (4, 31), (5, 128), (6, 129), (7, 517)], 0),
    "contexts": ([(0, 31), (1, 17), (2, 333), (8, 96)], 0),
    "mixed": ([(0, 1), (2, 1), (3, 700), (1, 5)], 2),
    "single": ([(0, 1), (1, 1), (2, 1)], 1),
}


@pytest.fixture(scope="module")
def backend() -> AttentionBackend:
    return get_backend("flashinfer")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def filled(spec: AttentionSpec, dtype: torch.dtype, block_size: int = 16) -> PagedCache:
    cache = PagedCache([spec], 256, block_size, dtype, "cuda")
    cache.step([(0, 1), (1, 700), (2, 130)])
    for seq, length in cache.lens.items():
        slots = torch.arange(length)
        blocks = torch.tensor(cache.tables[seq])[slots // block_size]
        for tensor in (cache.kv[0].k, cache.kv[0].v):
            values = torch.randn(length, spec.num_kv_heads, spec.head_dim)
            tensor[blocks.cuda(), (slots % block_size).cuda()] = values.to("cuda", dtype)
    return cache


def heads(spec: AttentionSpec, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    packed = torch.randn(num_tokens, sum(sizes), spec.head_dim, device="cuda", dtype=dtype)
    return packed.split(sizes, dim=1)


def check(
    got: torch.Tensor, qkv: tuple[torch.Tensor, ...], cache: PagedCache, batch, spec: AttentionSpec
) -> None:
    """Against the same inputs, widened."""
    wide = [x.float() for x in qkv]
    expected = TorchAttention().forward(*wide, cache.kv[0], batch, spec)
    tolerance = {FP16: 4e-3, BF16: 2e-2}[got.dtype] * (2 if spec.logit_softcap else 1)
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_backend_agrees_with_torch(backend: AttentionBackend, kind: str, step: str) -> None:
    (spec, dtype), (chunks, num_decodes) = KINDS[kind], STEPS[step]
    cache = filled(spec, dtype)
    batch = cache.step(chunks, num_decodes)
    qkv = heads(spec, sum(n for _, n in chunks), dtype)
    got = backend.forward(*qkv, cache.kv[0], batch, spec)
    check(got, qkv, cache, batch, spec)


@pytest.mark.parametrize("block_size", [8, 128])
def test_other_block_sizes(backend: AttentionBackend, block_size: int) -> None:
    spec, dtype = KINDS["four-64"]
    cache = filled(spec, dtype, block_size)
    batch = cache.step(*STEPS["mixed"])
    qkv = heads(spec, 707, dtype)
    got = backend.forward(*qkv, cache.kv[0], batch, spec)
    check(got, qkv, cache, batch, spec)


def test_from_a_packed_projection(backend: AttentionBackend) -> None:
    spec, dtype = KINDS["three-128"]
    cache = filled(spec, dtype)
    chunks, num_decodes = STEPS["mixed"]
    batch = cache.step(chunks, num_decodes)
    qkv = torch.cat([part.flatten(1) for part in heads(spec, 707, dtype)], dim=1)
    angles = torch.rand(2048, spec.head_dim // 2, device="cuda") * 6
    table = torch.cat([angles.cos(), angles.sin()], -1)
    how = HeadTransform(Rope(table, cache.positions(chunks).cuda(), dtype), None)
    rotated = split_and_rotate(qkv.clone(), spec.num_heads, spec.num_kv_heads, how)
    assert isinstance(backend, PackedAttention)
    got = backend.forward_packed(qkv, how, cache.kv[0], batch, spec)
    check(got, rotated, cache, batch, spec)


def test_steps_queued_ahead_of_the_device_keep_their_plans() -> None:
    """Each plan travels when the device comes to it: none may have been overwritten by then."""
    spec, dtype = KINDS["four-64"]
    backend, cache = get_backend("flashinfer"), filled(spec, dtype)
    assert isinstance(backend, PreparedAttention)
    backend.prepare([spec], dtype, torch.device("cuda"))
    lens = (300, 7, 129, 1, 64, 555)
    work = []
    for i, length in enumerate(lens):
        batch = cache.step([(10 + i, length), (1, 1 + i), (2, 200 - 30 * i)], 0)
        work.append((batch, heads(spec, sum(batch.query_lens), dtype)))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # a tenth of a second
    results = [backend.forward(*qkv, cache.kv[0], batch, spec) for batch, qkv in work]
    for got, (batch, qkv) in zip(results, work, strict=True):
        check(got, qkv, cache, batch, spec)
