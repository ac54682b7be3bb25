"""The Triton attention backend against the torch one: decodes, chunks and mixtures of both, over
caches whose unused parts are NaN.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.paged import PagedCache

pytest.importorskip("triton")

from octavo.attention import AttentionSpec, SharedPrefix, TorchAttention, get_backend
from octavo.kernels import launch
from octavo.kernels.paged_decode_triton import (
    MAX_PARTS,
    MIN_SPLIT_LEN,
    choose_config,
    plan_splits,
)
from octavo.runner.graphs import batch_ladder
from octavo.runner.runner import COMPILED_DECODES

SPECS = {
    "gqa": AttentionSpec(4, 2, 32, 32**-0.5),
    "odd-group": AttentionSpec(9, 3, 64, 0.1),
    "mha-80": AttentionSpec(2, 2, 80, 80**-0.5),
    "window": AttentionSpec(4, 1, 16, 0.25, sliding_window=37),
    "softcap": AttentionSpec(4, 2, 16, 0.25, logit_softcap=5.0),
    "window-softcap": AttentionSpec(2, 1, 24, 0.25, sliding_window=200, logit_softcap=5.0),
}
STEPS = {
    "decodes": [(0, 1), (1, 1), (2, 1)],
    "chunks": [(0, 31), (3, 17), (1, 2)],
    "mixed": [(0, 1), (2, 1), (3, 70), (1, 5)],
    "one": [(1, 1)],
}


def compare(spec, chunks, device, dtype=torch.float32, block_size=16, num_decodes=None):
    cache = PagedCache([spec], 128, block_size, dtype, device)
    cache.step([(0, 1), (1, 700), (2, 130)])
    for layer in cache.kv:
        for tensor in (layer.k, layer.v):
            for seq, length in cache.lens.items():
                for p in range(0, length, block_size):
                    block = cache.tables[seq][p // block_size]
                    rows = tensor[block, : min(block_size, length - p)]
                    rows.copy_(torch.randn(rows.shape).to(dtype))
    batch = cache.step(chunks, num_decodes)
    num_tokens = sum(n for _, n in chunks)
    heads = torch.randn(num_tokens, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    split = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    query, key, value = heads.to(device, dtype).split(split, dim=1)
    expected = TorchAttention().forward(query, key, value, cache.kv[0], batch, spec)
    backend = get_backend("triton")
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for _ in range(2):  # the second finds the counters as the first left them
        got = backend.forward(query, key, value, cache.kv[0], batch, spec)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SPECS)
def test_backend_agrees_with_torch(name, step, device):
    compare(SPECS[name], STEPS[step], device)


@pytest.mark.parametrize("target", [1, 2, 4])
@pytest.mark.parametrize("name", ["gqa", "window-softcap"])
def test_contexts_are_cut_by_how_full_the_gpu_is(name, target, device, monkeypatch):
    """As tens of sequences would be: 3 of 2 KV heads, on a GPU of few processors."""
    spec = SPECS[name]
    monkeypatch.setattr(
        launch, "num_processors", lambda device: 3 * spec.num_kv_heads * target // 2
    )
    compare(spec, STEPS["decodes"], device)


@pytest.mark.parametrize("num_kv_heads", [1, 4, 8])
@pytest.mark.parametrize("max_len", [1, 300, 2048, 32768])
def test_plans_of_splits(max_len, num_kv_heads):
    """No more parts than there is memory for, none that must be empty, and no kernel that start-up
    does not know of.
    """
    kinds = {}
    for num_seqs in batch_ladder(1024):
        splits = plan_splits(num_seqs, num_kv_heads, max_len, 132)
        assert 1 <= splits.most <= max(MAX_PARTS // (num_seqs * num_kv_heads), 1, 264 // num_seqs)
        assert (splits.most - 1) * splits.min_len < max_len
        programs = num_seqs * num_kv_heads * splits.most
        assert programs >= 264 or splits.most == -(-max_len // MIN_SPLIT_LEN) or max_len > 16384
        kinds[num_seqs] = splits.most > 1, choose_config(128, 2, splits.min_len)
    assert set(kinds.values()) == {
        kinds[size] for size in kinds if size in (*COMPILED_DECODES, 1024)
    }


@pytest.mark.parametrize("block_size", [16, 128])
def test_half_precision_and_block_sizes(block_size, device):
    compare(SPECS["gqa"], STEPS["mixed"], device, torch.float16, block_size)


def test_single_tokens_may_also_come_as_chunks(device):
    compare(SPECS["gqa"], [(0, 1), (1, 1), (2, 1)], device, num_decodes=1)


def test_padding_rows_do_no_harm(device):
    """A graph's spare rows: length 1, pointing at block 0, or length 0, which write nothing."""
    spec = SPECS["gqa"]
    cache = PagedCache([spec], device=device, block_size=16)
    for layer in cache.kv:
        layer.k.normal_()
        layer.v.normal_()
    batch = cache.step([(0, 1), (1, 1)])
    padded = dataclasses.replace(
        batch,
        seq_lens=torch.tensor([1, 1, 0, 1], dtype=torch.int32, device=device),
        slot_mapping=torch.cat([batch.slot_mapping, batch.slot_mapping.new_zeros(2)]),
        block_tables=torch.cat([batch.block_tables, torch.zeros_like(batch.block_tables)]),
        query_starts=torch.arange(5, dtype=torch.int32, device=device),
        num_decodes=4,
        max_seq_len=4096,
        query_lens=(1,) * 4,
        host_seq_lens=(1, 1, 0, 1),
    )
    query, key, value = torch.randn(4, 8, spec.head_dim, device=device).split([4, 2, 2], 1)
    got = get_backend("triton").forward(query, key, value, cache.kv[0], padded, spec)
    expected = value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(got[:2], expected[:2])
    assert got[3].isfinite().all()


@pytest.mark.parametrize("name", ["gqa", "odd-group", "mha-80", "softcap", "window"])
@pytest.mark.parametrize("num_splits", [1, 8])
def test_a_shared_prefix_is_read_once(name, num_splits, device, monkeypatch):
    """Sequences 0 and 2 begin with the same blocks, sequence 1 does not."""
    spec = SPECS[name]
    monkeypatch.setattr(launch, "num_processors", lambda device: 16 * num_splits)
    cache = PagedCache([spec], 128, 16, device=device)
    cache.step([(0, 90), (1, 70), (2, 80)])
    cache.tables[2][:4] = cache.tables[0][:4]
    batch = cache.step([(0, 1), (1, 1), (2, 1)])
    for layer in cache.kv:
        layer.k.normal_()
        layer.v.normal_()
    lens = torch.tensor([64, 0, 64], dtype=torch.int32, device=device)
    shared = SharedPrefix(batch.block_tables[2].clone(), lens, lens[:1])
    heads = torch.randn(3, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim, device=device)
    split = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    query, key, value = heads.split(split, dim=1)
    expected = TorchAttention().forward(query, key, value, cache.kv[0], batch, spec)
    batch = dataclasses.replace(batch, shared=shared)
    got = get_backend("triton").forward(query, key, value, cache.kv[0], batch, spec)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_mixed_steps_with_padding(device):
    """As a graph lays them out: empty decodes, empty chunks, tokens of nobody."""
    spec = SPECS["gqa"]
    cache = PagedCache([spec], device=device, block_size=16)
    for layer in cache.kv:
        layer.k.normal_()
        layer.v.normal_()
    cache.step([(0, 20), (1, 40), (2, 7)])
    batch = cache.step([(0, 1), (1, 1), (2, 9), (3, 30)])
    used = len(batch.slot_mapping)

    def spread(values, fill):  # room for 4 decodes and 3 chunks
        blank = values.new_full((1, *values.shape[1:]), fill)
        return torch.cat([values[:2], blank, blank, values[2:], blank])

    starts = torch.tensor([0, 1, 2, 2, 2, 11, 41, 41], dtype=torch.int32, device=device)
    padded = dataclasses.replace(
        batch,
        seq_lens=spread(batch.seq_lens, 0),
        block_tables=spread(batch.block_tables, 0),
        slot_mapping=torch.cat([batch.slot_mapping, batch.slot_mapping.new_zeros(7)]),
        query_starts=starts,
        num_decodes=4,
        max_query_len=48,
        query_lens=(0,) * 4 + (48,) * 3,
    )
    query, key, value = torch.randn(48, 8, spec.head_dim, device=device).split([4, 2, 2], 1)
    expected = TorchAttention().forward(
        query[:used], key[:used], value[:used], cache.kv[0], batch, spec
    )
    got = get_backend("triton").forward(query, key, value, cache.kv[0], padded, spec)
    torch.testing.assert_close(got[:used], expected, atol=1e-5, rtol=1e-5)
