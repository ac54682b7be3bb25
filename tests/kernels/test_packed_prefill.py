"""Chunks that find their keys side by side, in the projection or copied out of the cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.paged import PagedCache

pytest.importorskip("triton")

from octavo.attention import AttentionSpec, TorchAttention, get_backend
from octavo.kernels import launch, packed_prefill_triton
from octavo.kernels.qkv import HeadNorms, HeadTransform, split_and_rotate
from octavo.kernels.rope import Rope

SPECS = {"gqa": AttentionSpec(4, 2, 64, 0.125), "odd-group": AttentionSpec(6, 2, 128, 0.1)}


@pytest.fixture(autouse=True)
def copies_tiles(monkeypatch):
    monkeypatch.setattr(launch, "copies_tiles", lambda device: True)


def transform(spec, positions, dtype, device):
    angles = torch.rand(512, spec.head_dim // 2, device=device) * 6
    norms = HeadNorms(*torch.rand(2, spec.head_dim, device=device).to(dtype), 1e-6, False)
    return HeadTransform(Rope(torch.cat([angles.cos(), angles.sin()], -1), positions, dtype), norms)


def compare(spec, cache, chunks, device, change=lambda batch, qkv: (batch, qkv)):
    dtype = torch.float16
    batch = cache.step(chunks)
    used = len(batch.slot_mapping)
    heads = spec.num_heads + 2 * spec.num_kv_heads
    qkv = torch.randn(used, heads * spec.head_dim, device=device).to(dtype)
    how = transform(spec, cache.positions(chunks).to(device), dtype, device)
    query, key, value = split_and_rotate(qkv.clone(), spec.num_heads, spec.num_kv_heads, how)
    expected = TorchAttention().forward(query, key, value, cache.kv[0], batch, spec)
    changed, qkv = change(batch, qkv)
    padding = changed.slot_mapping.new_zeros(len(qkv) - used)
    positions = torch.cat([how.rope.positions, padding])
    how = HeadTransform(Rope(how.rope.table, positions, dtype), how.norms)
    got = get_backend("triton").forward_packed(qkv, how, cache.kv[0], changed, spec)
    torch.testing.assert_close(got[:used], expected, atol=4e-3, rtol=4e-3)


def make_cache(spec, device):
    return PagedCache([spec], 64, 16, torch.float16, device)


@pytest.mark.parametrize("name", SPECS)
def test_prompts_without_a_context(name, device):
    spec = SPECS[name]
    cache = make_cache(spec, device)
    cache.step([(0, 33)])
    for layer in cache.kv:
        for tensor in (layer.k, layer.v):
            for block in cache.tables[0]:
                tensor[block] = torch.randn(tensor[block].shape).to(tensor.dtype)

    def fresh(batch, qkv):
        return dataclasses.replace(batch, is_fresh=True), qkv

    compare(spec, cache, [(0, 1), (1, 70), (2, 5), (3, 100)], device, fresh)


def test_padding_in_a_graph_may_hold_anything(device):
    spec = SPECS["gqa"]

    def padded(batch, qkv):
        blank = torch.full((9, qkv.shape[1]), float("nan"), dtype=qkv.dtype, device=device)
        slots = torch.cat([batch.slot_mapping, batch.slot_mapping.new_zeros(9)])
        return dataclasses.replace(batch, is_fresh=True, slot_mapping=slots), torch.cat(
            [qkv, blank]
        )

    compare(spec, make_cache(spec, device), [(1, 70), (2, 5)], device, padded)


@pytest.mark.parametrize("name", SPECS)
def test_keys_are_gathered_from_the_cache(name, device):
    spec = SPECS[name]
    cache = make_cache(spec, device)
    cache.step([(0, 33), (1, 90), (3, 20)])
    for layer in cache.kv:
        layer.k.normal_()
        layer.v.normal_()

    def gathered(batch, qkv):
        lens = batch.seq_lens[batch.num_decodes :]
        starts = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
        return dataclasses.replace(batch, key_starts=starts, num_keys=int(starts[-1])), qkv

    compare(spec, cache, [(0, 1), (1, 66), (2, 5), (3, 31)], device, gathered)


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="for Hopper GPUs",
)
LARGE = {
    "one": AttentionSpec(3, 3, 128, 0.09),
    "four": AttentionSpec(16, 4, 128, 0.09),
    "seven": AttentionSpec(14, 2, 128, 0.09),
}


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("chunks", [[(1, 1030)], [(0, 1), (2, 7), (1, 1500), (3, 128), (4, 33)]])
def test_long_chunks_on_hopper(spec, chunks, dtype, monkeypatch):
    """Against the kernel for short chunks, for prompts with and without a context, and with padding
    as in a graph: empty sequences, and more tokens than they have.
    """
    assert packed_prefill_triton._load_hopper() is not None
    width = spec.num_kv_heads * 128
    query_lens = [n for _, n in chunks] + [0] * 3
    seq_lens = [n + 257 * (seq % 3) for seq, n in chunks] + [0] * 3
    rows, starts = (
        torch.tensor([sum(lens[:i]) for i in range(len(lens) + 1)], dtype=torch.int32).cuda()
        for lens in (seq_lens, query_lens)
    )
    num_tokens = sum(query_lens) + 77
    query = torch.randn(num_tokens, spec.num_heads, 128, device="cuda", dtype=dtype)
    keys = torch.randn(sum(seq_lens), 2 * width, device="cuda", dtype=dtype)
    lens = torch.tensor(seq_lens, dtype=torch.int32).cuda()
    where = keys, 0, width, rows, starts, lens, num_tokens, max(query_lens)
    out = {}
    for minimum in (1, 1 << 30):
        monkeypatch.setattr(packed_prefill_triton, "MIN_WARPGROUP_QUERIES", minimum)
        out[minimum] = torch.full_like(query, float("nan"))
        packed_prefill_triton.packed_prefill(
            query, out[minimum], *where, spec.num_kv_heads, spec.scale
        )
        assert out[minimum][-77:].isnan().all()
        out[minimum] = out[minimum][:-77]
    torch.testing.assert_close(*out.values(), atol=8e-3, rtol=8e-3)
