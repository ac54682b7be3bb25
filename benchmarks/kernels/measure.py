"""How kernels are timed and checked: inputs, clocks, records."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from octavo.attention import AttentionBatch, AttentionSpec, KVLayer

DTYPE = torch.bfloat16
L2_BYTES = 128 << 20  # what the inputs of a timing exceed together
DEVICE = "cuda"


@dataclass(frozen=True)
class Shape:
    """A model, as far as its kernels are concerned."""

    name: str
    size: int
    num_heads: int
    intermediate: int
    num_layers: int
    tied: bool
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_936

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) by name."""
        return {
            "qkv": (self.qkv, self.size),
            "o": (self.size, self.num_heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.size),
            "down": (self.size, self.intermediate),
            "head": (self.vocab, self.size),
        }


QWEN3_8B = Shape("8B", 4096, 32, 12_288, 36, tied=False)
QWEN3_06B = Shape("0.6B", 1024, 16, 3072, 28, tied=True)
MODELS = (QWEN3_8B, QWEN3_06B)
records: list[dict[str, Any]] = []
ceilings: dict[str, float] = {}


# ---- measuring


def poison(like: torch.Tensor) -> None:
    """Leave NaN where the allocator will put the next tensor of this size."""
    if like.is_floating_point():
        torch.full_like(like, float("nan"))
    torch.cuda.synchronize()


def time_us(calls: list[Callable[[], Any]], min_calls: int = 24) -> float:
    """Microseconds per call, in a CUDA graph that makes all of them in turn; the best of some
    replays.
    """
    calls = calls * max(1, min_calls // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    best = math.inf
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    deadline = time.perf_counter() + 0.12
    for i in range(50):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop))
        if i >= 4 and time.perf_counter() > deadline:
            break
    return 1000 * best / len(calls)


def copies_of(num_bytes: int) -> int:
    return max(1, min(32, math.ceil(L2_BYTES / max(num_bytes, 1))))


def report(
    kernel: str,
    shape: str,
    us: float,
    *,
    num_bytes: float = 0,
    flops: float = 0,
    alternative: float | None = None,
    note: str = "",
) -> None:
    """One line of the table."""
    rate, share = "", ""
    if num_bytes:
        rate = f"{num_bytes / us / 1e3:8.0f} GB/s"
        share = f"{100 * num_bytes / us / 1e3 / ceilings.get('read', 3080):4.0f}%"
    if flops:
        rate = f"{flops / us / 1e6:8.1f} TF/s"
        share = f"{100 * flops / us / 1e6 / ceilings.get('matmul', 766):4.0f}%"
    other = "" if alternative is None else f"{alternative:10.2f}"
    print(f"{kernel:18s} {shape:34s} {us:10.2f} {rate:14s} {share:5s} {other:>10s} {note}")
    sys.stdout.flush()
    record = {"kernel": kernel, "shape": shape, "us": us, "bytes": num_bytes, "flops": flops}
    records.append(record | {"alternative_us": alternative, "note": note})


@contextmanager
def setting(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


# ---- a paged cache


@dataclass
class Paged:
    """A cache filled with random numbers, and a batch over it."""

    kv: KVLayer
    batch: AttentionBatch
    num_tokens: int

    @classmethod
    def make(
        cls,
        shape: Shape,
        query_lens: list[int],
        seq_lens: list[int],
        num_decodes: int,
        block_size: int = 16,
    ) -> Paged:
        counts = [math.ceil(n / block_size) for n in seq_lens]
        blocks = torch.randperm(sum(counts)) + 1
        tables = torch.zeros(len(seq_lens), max(counts), dtype=torch.int32)
        for i, part in enumerate(blocks.split(counts)):
            tables[i, : len(part)] = part
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        slots = torch.cat(
            [
                tables[i, p // block_size].long() * block_size + p % block_size
                for i, (q, s) in enumerate(zip(query_lens, seq_lens, strict=True))
                for p in [torch.arange(s - q, s)]
            ]
        )
        cache = (sum(counts) + 1, block_size, shape.num_kv_heads, shape.head_dim)
        batch = AttentionBatch(
            slot_mapping=slots.to(DEVICE),
            query_starts=starts.to(DEVICE, torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
            block_tables=tables.to(DEVICE),
            num_decodes=num_decodes,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            query_lens=tuple(query_lens),
            host_seq_lens=tuple(seq_lens),
        )
        return cls(KVLayer(random(*cache), random(*cache)), batch, sum(query_lens))

    def sequence(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a sequence, [seq_len, num_kv_heads, head_dim] float64."""
        n = self.batch.host_seq_lens[i]
        blocks = self.batch.block_tables[i, : math.ceil(n / self.kv.k.shape[1])].long()
        return tuple(c[blocks].flatten(0, 1)[:n].double() for c in (self.kv.k, self.kv.v))


def exact_attention(query: torch.Tensor, paged: Paged, spec: AttentionSpec) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=torch.float64, device=DEVICE)
    starts = paged.batch.query_starts.tolist()
    for i, seq_len in enumerate(paged.batch.host_seq_lens):
        rows = slice(starts[i], starts[i + 1])
        k, v = paged.sequence(i)
        group = spec.num_heads // spec.num_kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), k) * spec.scale
        if spec.logit_softcap:
            scores = spec.logit_softcap * torch.tanh(scores / spec.logit_softcap)
        keys = torch.arange(seq_len, device=DEVICE)
        positions = keys[seq_len - (rows.stop - rows.start) :][:, None]
        hidden = keys > positions
        if spec.sliding_window:
            hidden |= keys <= positions - spec.sliding_window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
    return out
