"""TorchAttention against a dense attention written with nothing but einsum and a mask."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.paged import PagedCache

from octavo.attention import AttentionSpec, TorchAttention, get_backend, torch_backend
from octavo.errors import ConfigError

SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=8, scale=0.3)


def dense(query, key, value, spec, first_query):
    """One sequence. query [q, heads, d] at positions from first_query; key, value [len, kv, d]."""
    group = spec.num_heads // spec.num_kv_heads
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) * spec.scale
    if spec.logit_softcap is not None:
        scores = spec.logit_softcap * torch.tanh(scores / spec.logit_softcap)
    queries = first_query + torch.arange(len(query), device=query.device)[:, None]
    keys = torch.arange(len(key), device=query.device)
    hidden = keys > queries
    if spec.sliding_window is not None:
        hidden |= keys <= queries - spec.sliding_window
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double())


class Sequences:
    """Random queries, keys and values of some sequences, and their dense attention."""

    def __init__(
        self, spec, dtype=torch.float32, seed=0, block_size=4, num_blocks=64, device="cpu"
    ):
        self.spec = spec
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = PagedCache([spec], num_blocks, block_size, dtype, device, seed)
        self.backend = TorchAttention()
        self.keys, self.values = {}, {}

    def random(self, *shape):
        values = torch.randn(shape, generator=self.generator) * 2
        return values.to(self.device, self.dtype)

    def run(self, chunks, num_decodes=None):
        """(got, expected) of one step, [num_tokens, num_heads, head_dim]."""
        spec = self.spec
        batch = self.cache.step(chunks, num_decodes)
        num_tokens = len(batch.slot_mapping)
        query = self.random(num_tokens, spec.num_heads, spec.head_dim)
        key = self.random(num_tokens, spec.num_kv_heads, spec.head_dim)
        value = self.random(num_tokens, spec.num_kv_heads, spec.head_dim)
        expected, start = [], 0
        for seq, chunk_len in chunks:
            rows = slice(start, start + chunk_len)
            empty = key[:0]
            self.keys[seq] = torch.cat([self.keys.get(seq, empty), key[rows]])
            self.values[seq] = torch.cat([self.values.get(seq, empty), value[rows]])
            first_query = len(self.keys[seq]) - chunk_len
            expected.append(dense(query[rows], self.keys[seq], self.values[seq], spec, first_query))
            start += chunk_len
        got = self.backend.forward(query, key, value, self.cache.kv[0], batch, spec)
        return got, torch.cat(expected)

    def check(self, chunks, num_decodes=None, tolerance=1e-5):
        got, expected = self.run(chunks, num_decodes)
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


SPECS = {
    "gqa": SPEC,
    "mha": dataclasses.replace(SPEC, num_kv_heads=6),
    "mqa": dataclasses.replace(SPEC, num_kv_heads=1),
    "window": dataclasses.replace(SPEC, sliding_window=5),
    "window-1": dataclasses.replace(SPEC, sliding_window=1),
    "wide-window": dataclasses.replace(SPEC, sliding_window=1000),
    "softcap": dataclasses.replace(SPEC, logit_softcap=2.0),
    "softcap-window": dataclasses.replace(SPEC, logit_softcap=2.0, sliding_window=7),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_mixed_batches_agree_with_dense_attention(spec):
    sequences = Sequences(spec)
    sequences.check([(0, 1)])  # a decode with no context
    sequences.check([(0, 1), (1, 13)])
    sequences.check([(0, 1), (1, 1), (2, 8), (3, 3)])  # 8: exactly two blocks
    sequences.check([(1, 1), (0, 1), (2, 4), (3, 17)])
    sequences.check([(2, 1), (3, 1), (4, 1)], num_decodes=2)  # a chunk that is one token long
    for _ in range(6):  # over a block boundary
        sequences.check([(4, 1), (1, 1), (3, 1), (0, 1), (2, 1)])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_small_tiles_and_groups_change_nothing(spec, monkeypatch):
    monkeypatch.setattr(torch_backend, "TILE_QUERIES", 3)
    monkeypatch.setattr(torch_backend, "GATHER_BYTES", {"cuda": 4096})
    monkeypatch.setattr(torch_backend, "FREE_PADDING_TOKENS", 0)
    sequences = Sequences(spec)
    sequences.check([(seq, 1 + 5 * seq % 17) for seq in range(6)], num_decodes=0)
    sequences.check([(0, 11), (3, 7), (4, 1)], num_decodes=0)
    sequences.check([(seq, 1) for seq in (3, 0, 5, 1, 4, 2)])


@examples(40)
@given(
    spec=st.sampled_from(list(SPECS.values())),
    block_size=st.sampled_from([1, 3, 16]),
    seed=st.integers(0, 2**16),
)
def test_any_schedule_agrees_with_dense_attention(spec, block_size, seed):
    rng = random.Random(seed)
    sequences = Sequences(spec, seed=seed, block_size=block_size, num_blocks=512)
    for _ in range(4):
        decodes = [(s, 1) for s in sequences.keys if rng.random() < 0.5]
        others = [s for s in range(6) if (s, 1) not in decodes]
        chunks = [
            (s, rng.choice([1, 2, 7, 31]))
            for s in rng.sample(others, min(rng.randint(0, 2), len(others)))
        ]
        if decodes or chunks:
            sequences.check(decodes + chunks, num_decodes=len(decodes))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("name", ["gqa", "softcap-window"])
def test_half_precision(name, dtype, tolerance):
    sequences = Sequences(SPECS[name], dtype)
    sequences.check([(0, 9), (1, 5)], tolerance=tolerance)
    sequences.check([(0, 1), (1, 1), (2, 6)], tolerance=tolerance)


def test_many_decodes_of_different_lengths():
    sequences = Sequences(SPEC, block_size=16, num_blocks=1024)
    sequences.check([(seq, 3 + 37 * seq % 200) for seq in range(64)], num_decodes=0)
    sequences.check([(seq, 1) for seq in range(64)])


def test_padding_tokens_come_out_zero():
    cache = PagedCache([SPEC])
    batch = cache.step([(0, 3)])
    padded = dataclasses.replace(
        batch, slot_mapping=torch.cat([batch.slot_mapping, torch.zeros(2, dtype=torch.int64)])
    )
    query, key = torch.randn(5, 6, 8), torch.randn(5, 2, 8)
    got = TorchAttention().forward(query, key, key, cache.kv[0], padded, SPEC)
    assert got[3:].eq(0).all()
    assert not got[:3].isnan().any()


def test_unknown_backend_is_refused_with_the_known_ones():
    assert get_backend("torch").name == "torch"
    with pytest.raises(ConfigError, match="known: torch"):
        get_backend("flash")


def test_groups_are_bounded_and_well_filled():
    lens = [10, 2000, 990, 12, 1000, 11, 5]
    groups = torch_backend._similar(lens, budget=2500)
    assert sorted(row for group in groups for row in group) == list(range(len(lens)))
    assert groups == [[0, 3, 5, 6], [2, 4], [1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.06), (torch.float16, 0.01)],
    ids=str,
)
@pytest.mark.parametrize("name", SPECS)
def test_on_a_gpu(name, dtype, tolerance):
    spec = dataclasses.replace(SPECS[name], head_dim=64, scale=0.125)
    sequences = Sequences(spec, dtype, block_size=16, num_blocks=1024, device="cuda")
    sequences.check([(0, 9), (1, 51), (2, 130), (3, 16)], tolerance=tolerance)
    sequences.check([(3, 1), (0, 1), (1, 1), (2, 600), (4, 7)], tolerance=tolerance)
    sequences.check([(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)], tolerance=tolerance)
    sequences.check([(4, 1)], tolerance=tolerance)
    # A query that is alone in a tile of torch's.
    sequences.check([(5, 65), (6, 129), (7, 193)], tolerance=tolerance)
    sequences.check([(5, 65), (0, 129)], tolerance=tolerance)
