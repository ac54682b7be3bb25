"""What the GPU kernels compute and what they cost, at the shapes of Qwen3 8B and 0.6B.

    python benchmarks/kernels.py [--sweep] [--only SECTION ...] [--json PATH]

First every kernel is checked against float64 (or the plain twin) on fresh random input, its output
memory poisoned with NaN; then each is timed by replays of a CUDA graph over inputs that together
exceed the L2 cache, beside what torch offers for the same. `--sweep` times configurations instead.
"""

# ruff: noqa: B023  # closures are called before the loop goes on

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from octavo.attention import AttentionBatch, AttentionSpec, ForwardContext, KVLayer, TorchAttention
from octavo.attention.triton_backend import TritonAttention
from octavo.kernels import (
    activation_triton,
    gemv_triton,
    launch,
    linear,
    moe,
    moe_triton,
    norm_triton,
    paged_decode_triton,
    paged_prefill_triton,
    qkv_triton,
    sampling,
    sampling_triton,
)
from octavo.kernels.activation import gated_activation_torch
from octavo.kernels.linear import Around, linear_around_torch
from octavo.kernels.norm import rms_norm_torch
from octavo.kernels.qkv import HeadNorms, HeadTransform, rotate_and_store_torch
from octavo.kernels.rope import Rope
from octavo.models import create_model

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


# ---- checks


def check(name: str, got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Relative error in the root mean square, and no poison left."""
    got, expected = got.double(), expected.double()
    error = ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    verdict = "ok" if error <= limit else "WRONG"  # NaN is wrong
    print(f"check {name:50s} relative error {error:.2e}  {verdict}", flush=True)
    records.append({"check": name, "error": error, "ok": verdict == "ok"})


def check_elementwise() -> None:
    for size, add_one in ((4096, False), (1024, False), (2089, True)):
        x, residual, weight = random(37, size), random(37, size), random(size)
        exact = rms_norm_torch(
            x.double(), weight.double(), 1e-6, residual.double(), add_one=add_one
        )
        poison(x)
        got = norm_triton.rms_norm(x, weight, 1e-6, residual.clone(), add_one)
        check(f"rms_norm {size}", got[0], exact[0], 8e-3)
        check(f"rms_norm {size}, sum", got[1], exact[1], 8e-3)
    for name in ("silu", "gelu", "gelu_pytorch_tanh"):
        gate_up = random(33, 2 * 3072, scale=2)
        poison(gate_up[:, :3072].contiguous())
        got = activation_triton.gated_activation(gate_up, name)
        check(f"gated {name}", got, gated_activation_torch(gate_up.double(), name), 8e-3)
    for num_tokens, head_dim, rot_dim, normed in (
        (1, 128, 128, True), (300, 128, 128, True), (5, 96, 96, False), (70, 80, 32, False),
    ):  # fmt: skip
        num_heads, num_kv_heads = 16, 4
        qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
        positions = torch.randint(0, 4096, (num_tokens,), device=DEVICE)
        angles = torch.rand(4096, rot_dim // 2, device=DEVICE) * 6
        table = torch.cat([angles.cos(), angles.sin()], -1)
        weights = random(2, head_dim)
        slots = torch.randperm(64 * 16, device=DEVICE)[:num_tokens]
        results = []
        for dtype in (torch.float64, DTYPE):
            cache = torch.zeros(2, 64, 16, num_kv_heads, head_dim, dtype=dtype, device=DEVICE)
            norms = HeadNorms(*weights.to(dtype), 1e-6, False) if normed else None
            transform = HeadTransform(Rope(table, positions, dtype), norms)
            function = rotate_and_store_torch if dtype != DTYPE else qkv_triton.rotate_and_store
            poison(qkv[:, : num_heads * head_dim].contiguous())
            query = function(qkv.to(dtype), num_heads, transform, *cache, slots)
            results.append((query, cache))
        check(f"qkv {num_tokens}x{head_dim}/{rot_dim}, query", results[1][0], results[0][0], 8e-3)
        check(f"qkv {num_tokens}x{head_dim}/{rot_dim}, cache", results[1][1], results[0][1], 8e-3)


def check_attention() -> None:
    for overrides, spec_more in (
        ({}, {}),
        ({"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}, {}),
        ({"head_dim": 96, "num_kv_heads": 32}, {"sliding_window": 100}),
        ({"num_heads": 8, "num_kv_heads": 4, "head_dim": 256}, {"logit_softcap": 5.0}),
        ({"num_heads": 14, "num_kv_heads": 2, "head_dim": 80}, {"sliding_window": 1000}),
    ):
        shape = Shape(**{**QWEN3_8B.__dict__, **overrides})
        spec = AttentionSpec(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim**-0.5, **spec_more
        )
        for kind, query_lens, seq_lens, num_decodes in (
            ("decode", [1] * 5, [1, 17, 2089, 700, 9000], 5),
            ("prefill", [821, 64, 3], [821, 64, 3], 0),
            ("mixed", [1, 1, 857, 5, 300], [33, 4000, 857, 1000, 3000], 2),
        ):
            paged = Paged.make(shape, query_lens, seq_lens, num_decodes)
            query = random(paged.num_tokens, shape.num_heads, shape.head_dim)
            backend = TritonAttention()
            expected = exact_attention(query, paged, spec)
            for _ in range(2):
                poison(query)
                got = backend._attend(query, paged.kv, paged.batch, spec)
            name = f"attention {kind} {shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}"
            check(f"{name} {spec_more or ''}", got, expected, 1e-2)


def check_linear() -> None:
    for num_tokens in (1, 2, 3, 4, 7, 16):
        for out_features, in_features in ((6144, 4096), (1024, 3072), (4099, 821 * 8)):
            plan = gemv_triton.plan(num_tokens, out_features, in_features)
            if plan is None:
                continue
            weight = random(out_features, in_features, scale=in_features**-0.5)
            residual = random(num_tokens, out_features)
            kinds = {"plain": Around(), "norm": Around(norm=random(in_features), eps=1e-6)}
            if num_tokens <= gemv_triton.MAX_GEMV_TOKENS:
                kinds["silu+residual"] = Around(activation="silu", residual=residual)
            for kind, around in kinds.items():
                x = random(num_tokens, in_features * (2 if around.activation else 1))
                poison(residual)
                got = gemv_triton.run(plan, x, weight, None, around)
                wide = {
                    k: v.double() if isinstance(v, torch.Tensor) else v
                    for k, v in around._asdict().items()
                }
                exact = linear_around_torch(x.double(), weight.double(), None, Around(**wide))
                check(f"linear {num_tokens}x{in_features}->{out_features} {kind}", got, exact, 6e-3)


def check_sampling() -> None:
    n, vocab = 40, QWEN3_8B.vocab
    logits = random(n, vocab, scale=3, dtype=torch.float32)
    got = sampling_triton.argmax(logits)
    check("argmax", got, logits.argmax(-1), 0)
    ids = torch.randint(0, vocab, (n,), device=DEVICE)
    expected = sampling.token_logprobs_torch(logits.double(), ids)
    check("token_logprobs", sampling_triton.token_logprobs(logits, ids), expected, 1e-5)
    kinds = torch.tensor(
        [[1, 0, 1, 0], [0, 0, 1, 0], [0.8, 50, 1, 0], [1, 0, 0.9, 0], [0.7, 20, 0.8, 0.05]],
        device=DEVICE,
    )
    temperature, top_k, top_p, min_p = kinds.repeat(n // 5, 1).T.contiguous()
    seeds = torch.randint(-(2**62), 2**62, (n,), device=DEVICE)
    positions = torch.arange(n, device=DEVICE)
    from octavo.runner.random import uniforms

    numbers = uniforms(seeds, positions)
    expected = sampling.sample_torch(
        logits.double(), temperature, top_k.long(), top_p, min_p, numbers
    )
    got = sampling_triton.sample(logits, temperature, top_k.int(), top_p, min_p, seeds, positions)
    same = (got == expected).sum().item()
    print(f"check sample: {same} of {n} rows as by sorting in float64 (sums differ by rounding)")
    records.append({"check": "sample", "same": same, "of": n, "ok": same >= n - 2})


def check_moe() -> None:
    for num_tokens in (1, 3, 50, 700, 3000):
        x = random(num_tokens, 512)
        gate_up, down = random(32, 2 * 256, 512, scale=0.05), random(32, 512, 256, scale=0.06)
        logits = random(num_tokens, 32)
        routing = moe.route_torch(logits.double(), 4, renormalise=True)
        weights, experts = moe_triton.route(logits, 4, True)
        check(f"moe routing {num_tokens}", weights, routing.weights, 1e-5)
        wide = moe.Routing(weights.double(), experts)
        exact = moe.run_experts_torch(x.double(), gate_up.double(), down.double(), wide, "silu")
        poison(x)
        got = moe_triton.run_experts(x, gate_up, down, weights, experts, "silu")
        check(f"moe experts {num_tokens}", got, exact, 1e-2)


# ---- timings


def time_ceilings() -> None:
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).view(torch.float32)
    y = torch.empty_like(x)
    us = time_us([lambda: y.copy_(x)], 4)
    ceilings["copy"] = 2 * x.nbytes / us / 1e3
    report("ceiling copy", "1 GiB", us, num_bytes=2 * x.nbytes)
    weight = x.view(DTYPE).zero_().view(-1, 16_384)
    us = time_us([lambda: sampling_triton.argmax(weight)], 4)
    ceilings["read"] = max(weight.nbytes / us / 1e3, ceilings["copy"])
    report("ceiling read", "1 GiB", us, num_bytes=weight.nbytes)
    a, b = random(8192, 8192), random(8192, 8192)
    us = time_us([lambda: a @ b], 4)
    ceilings["matmul"] = 2 * 8192**3 / us / 1e6
    report("ceiling matmul", "8192^3 bf16", us, flops=2 * 8192**3)


def time_elementwise() -> None:
    for shape in MODELS:
        for n in (1, 16, 256, 2048):
            where = f"{shape.name} M={n}"
            norm_bytes = 8 * n * shape.size
            xs = [
                (random(n, shape.size), random(n, shape.size)) for _ in range(copies_of(norm_bytes))
            ]
            weight = random(shape.size)
            us, other = (
                time_us([lambda x=x, r=r, f=f: f(x, r) for x, r in xs])
                for f in (
                    lambda x, r: norm_triton.rms_norm(x, weight, 1e-6, r, False),
                    lambda x, r: rms_norm_torch(x, weight, 1e-6, r),
                )
            )
            report("add+rms_norm", where, us, num_bytes=norm_bytes, alternative=other)
            gate_bytes = 6 * n * shape.intermediate
            gates = [random(n, 2 * shape.intermediate) for _ in range(copies_of(gate_bytes))]
            us, other = (
                time_us([lambda g=g, f=f: f(g, "silu") for g in gates])
                for f in (activation_triton.gated_activation, gated_activation_torch)
            )
            report("silu_mul", where, us, num_bytes=gate_bytes, alternative=other)
            time_qkv(shape, n, where)


def time_qkv(shape: Shape, n: int, where: str) -> None:
    num_bytes = 4 * n * shape.qkv
    positions = torch.randint(0, 4096, (n,), device=DEVICE)
    norms = HeadNorms(random(shape.head_dim), random(shape.head_dim), 1e-6, False)
    transform = HeadTransform(Rope(torch.rand(4096, 128, device=DEVICE), positions, DTYPE), norms)
    slots = torch.randperm(4096 * 16, device=DEVICE)[:n]
    cache = torch.zeros(2, 4096, 16, shape.num_kv_heads, shape.head_dim, dtype=DTYPE, device=DEVICE)
    xs = [random(n, shape.qkv) for _ in range(copies_of(num_bytes))]
    us, other = (
        time_us([lambda x=x, f=f: f(x, shape.num_heads, transform, *cache, slots) for x in xs])
        for f in (qkv_triton.rotate_and_store, rotate_and_store_torch)
    )
    report("norm+rope+store", where, us, num_bytes=num_bytes, alternative=other)


def time_linear() -> None:
    for shape in MODELS:
        for n in (1, 2, 4, 8, 16, 64, 256):
            totals = [0.0, 0.0]
            for name, (out_features, in_features) in shape.linears().items():
                num_bytes = 2 * out_features * in_features
                weights = [random(out_features, in_features) for _ in range(copies_of(num_bytes))]
                x = random(n, in_features)
                other = time_us([lambda w=w: F.linear(x, w) for w in weights])
                plan = gemv_triton.plan(n, out_features, in_features)
                us = other
                if plan is not None:
                    us = time_us(
                        [lambda w=w: gemv_triton.run(plan, x, w, None, Around()) for w in weights]
                    )
                    where = f"{shape.name} {name} M={n} {out_features}x{in_features}"
                    report(
                        type(plan).__name__[:-4].lower(), where, us,
                        num_bytes=num_bytes, alternative=other, note=str(tuple(plan)),
                    )  # fmt: skip
                count = 1 if name == "head" else shape.num_layers
                totals[0] += us * count
                totals[1] += other * count
                del weights
            report("all linears", f"{shape.name} M={n}", totals[0], alternative=totals[1])


def time_attention() -> None:
    shape = QWEN3_8B
    spec = AttentionSpec(32, 8, 128, 128**-0.5)
    for n, context in (
        (1, 128), (1, 512), (1, 16_384), (16, 512), (16, 16_384), (64, 2048), (256, 1024),
    ):  # fmt: skip
        num_bytes = 4 * n * context * shape.num_kv_heads * shape.head_dim
        pages = [Paged.make(shape, [1] * n, [context] * n, n) for _ in range(copies_of(num_bytes))]
        query, backend = random(n, 32, 128), TritonAttention()
        us = time_us([lambda p=p: backend._attend(query, p.kv, p.batch, spec) for p in pages])
        splits = paged_decode_triton.count_splits(
            n, 8, context, launch.num_processors(query.device)
        )
        report(
            "attention decode", f"8B {n} x {context}", us, num_bytes=num_bytes,
            note=f"{splits} splits",
        )  # fmt: skip
    for chunks in (
        [(2048, 2048)], [(2048, 2048)] * 4, [(512, 512)], [(16_384, 16_384)], [(2048, 16_384)],
        [(64, 1024)] * 16, [(16, 600)] * 16,
    ):  # fmt: skip
        paged = Paged.make(shape, [q for q, _ in chunks], [s for _, s in chunks], 0)
        query, backend = random(paged.num_tokens, 32, 128), TritonAttention()
        us = time_us([lambda: backend._attend(query, paged.kv, paged.batch, spec)], 4)
        pairs = sum(q * (s - q) + q * (q + 1) / 2 for q, s in chunks)
        other = None
        q, s = chunks[0]
        if q == s:
            # Heads repeated beforehand, which torch's fastest kernel wants.
            rows = [random(len(chunks), 32, q, 128) for _ in range(3)]
            other = time_us([lambda: F.scaled_dot_product_attention(*rows, is_causal=True)], 4)
        report(
            "attention chunks", f"8B {len(chunks)} x {q} of {s}", us,
            flops=4 * pairs * 32 * 128, alternative=other,
        )  # fmt: skip


def time_sampling() -> None:
    for n in (1, 16, 64, 256):
        logits = random(n, QWEN3_8B.vocab, scale=3, dtype=torch.float32)
        num_bytes = logits.nbytes
        us = time_us([lambda: sampling_triton.argmax(logits)])
        other = time_us([lambda: logits.argmax(-1)])
        report("argmax", f"n={n}", us, num_bytes=num_bytes, alternative=other)
        ones = torch.ones(n, device=DEVICE)
        ints = torch.arange(n, device=DEVICE)
        for name, k, p in (("free", 0, 1.0), ("top_k 50", 50, 1.0), ("top_p 0.9", 0, 0.9)):
            rows = (ones, ints * 0 + k, ones * p, ones * 0, ints, ints)
            us = time_us([lambda rows=rows: sampling_triton.sample(logits, *rows)], 4)
            other = None
            if k:
                other = time_us([lambda: torch.softmax(logits, -1).topk(256)], 4)
            report(f"sample {name}", f"n={n}", us, alternative=other)


def time_moe() -> None:
    """A layer's experts at the shape of Qwen3 30B-A3B."""
    num_experts, top_k, size, intermediate = 128, 8, 2048, 768
    expert_bytes = 6 * size * intermediate
    gate_up = random(num_experts, 2 * intermediate, size, scale=0.02)
    down = random(num_experts, size, intermediate, scale=0.02)
    for n in (1, 4, 16, 64, 256, 2048):
        x, logits = random(n, size), random(n, num_experts)
        us = time_us([lambda: moe_triton.route(logits, top_k, True)])
        report("moe route", f"30B-A3B M={n}", us)
        # With few tokens different experts each time, so that L2 does not hold them.
        routings = [
            moe_triton.route(random(n, num_experts), top_k, True)
            for _ in range(16 if n <= 4 else 1)
        ]
        used = sum(len(experts.unique()) for _, experts in routings) / len(routings)
        us = time_us(
            [lambda r=r: moe_triton.run_experts(x, gate_up, down, *r, "silu") for r in routings],
            4,
        )
        flops = 2 * n * top_k * 3 * size * intermediate
        report(
            "moe experts", f"30B-A3B M={n}", us,
            num_bytes=used * expert_bytes if n <= 256 else 0, flops=flops if n > 256 else 0,
            note=f"{used:.0f} experts",
        )  # fmt: skip


def time_models() -> None:
    """A whole decode step in one graph: all layers, head, greedy choice; contexts of 512."""
    for shape in MODELS:
        with torch.device(DEVICE):
            torch.set_default_dtype(DTYPE)
            model = create_model(
                {
                    "architectures": ["Qwen3ForCausalLM"],
                    "vocab_size": shape.vocab,
                    "hidden_size": shape.size,
                    "intermediate_size": shape.intermediate,
                    "num_hidden_layers": shape.num_layers,
                    "num_attention_heads": shape.num_heads,
                    "num_key_value_heads": shape.num_kv_heads,
                    "head_dim": shape.head_dim,
                    "max_position_embeddings": 40_960,
                    "rms_norm_eps": 1e-6,
                    "rope_theta": 1e6,
                    "hidden_act": "silu",
                    "tie_word_embeddings": shape.tied,
                },
                4096,
            )
            torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02)
        for n in (1, 4, 16, 64, 256):
            time_model(shape, model, n)
        del model
        torch.cuda.empty_cache()


def time_model(shape: Shape, model: Any, n: int, context: int = 512) -> None:
    paged = Paged.make(shape, [1] * n, [context] * n, n)
    ids = torch.randint(0, shape.vocab, (n,), device=DEVICE)
    positions = torch.full((n,), context - 1, device=DEVICE)
    kv = tuple(KVLayer(paged.kv.k.clone(), paged.kv.v.clone()) for _ in range(shape.num_layers))

    def step(backend: Any) -> torch.Tensor:
        hidden = model(ids, positions, ForwardContext(paged.batch, kv, backend))
        return sampling_triton.argmax(model.compute_logits(hidden))

    weight_bytes = sum(p.nbytes for p in model.parameters())
    if not shape.tied:
        weight_bytes -= shape.vocab * shape.size * 2
    num_bytes = weight_bytes + sum(layer.k.nbytes * 2 for layer in kv)
    backend = TritonAttention()
    variants = {
        "all on": (True, 4, 16),
        "no overlap": (False, 4, 16),
        "no fused layer": (True, 0, 16),
        "cuBLAS only": (True, 0, 0),
        "cuBLAS only, no overlap": (False, 0, 0),
    }
    for note, (overlap, fused, few) in variants.items():
        if n > 16 and note not in ("all on", "cuBLAS only, no overlap"):
            continue
        with (
            setting(launch, "programmatic_launch", overlap),
            setting(linear, "MAX_FUSED_TOKENS", fused),
            setting(linear, "MAX_TOKENS", few),
            torch.inference_mode(),
        ):
            try:
                us = time_us([lambda: step(backend)], 1)
                report("decode step", f"{shape.name} M={n}", us, num_bytes=num_bytes, note=note)
            except Exception:
                traceback.print_exc()


def check_models() -> None:
    """A small Qwen3 through the Triton path against the torch one: last logits."""
    shape = Shape("tiny", 512, 8, 1024, 3, tied=True, num_kv_heads=2, vocab=1024)
    with torch.device(DEVICE):
        config = {
            "architectures": ["Qwen3ForCausalLM"], "vocab_size": 1024, "hidden_size": 512,
            "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
            "tie_word_embeddings": True,
        }  # fmt: skip
        torch.set_default_dtype(DTYPE)
        model = create_model(config, 4096)
        torch.set_default_dtype(torch.float64)
        exact = create_model(config, 4096)
        torch.set_default_dtype(torch.float32)
    for wide, narrow in zip(exact.parameters(), model.parameters(), strict=True):
        wide.data.normal_(0, 0.05)
        if wide.ndim == 1:
            wide.data.add_(1)
        narrow.data.copy_(wide)
        wide.data.copy_(narrow)
    for name, query_lens, seq_lens, num_decodes in (
        ("decode 1", [1], [300], 1),
        ("decode 3", [1] * 3, [300, 1, 90], 3),
        ("decode 12", [1] * 12, [300, 1, 90] * 4, 12),
        ("mixed", [1, 1, 200, 33], [50, 1000, 500, 33], 2),
    ):
        paged = Paged.make(shape, query_lens, seq_lens, num_decodes)
        ids = torch.randint(0, 1024, (paged.num_tokens,), device=DEVICE)
        positions = torch.cat(
            [torch.arange(s - q, s, device=DEVICE) for q, s in zip(query_lens, seq_lens)]  # noqa: B905
        )
        logits = []
        for m, backend in ((exact, TorchAttention()), (model, TritonAttention())):
            dtype = next(m.parameters()).dtype
            kv = tuple(
                KVLayer(paged.kv.k.to(dtype).clone(), paged.kv.v.to(dtype).clone())
                for _ in range(3)
            )
            with torch.inference_mode():
                off = setting(launch, "programmatic_launch", dtype == DTYPE)
                with off:
                    hidden = m(ids, positions, ForwardContext(paged.batch, kv, backend))
                    logits.append(m.compute_logits(hidden))
        check(f"model, {name}", logits[1], logits[0], 4e-2)


# ---- sweeps


def sweep_prefill() -> None:
    shape, spec = QWEN3_8B, AttentionSpec(32, 8, 128, 128**-0.5)
    for length in (2048, 16_384):
        paged = Paged.make(shape, [length], [length], 0)
        query = random(length, 32, 128)
        backend, choose = TritonAttention(), paged_prefill_triton.choose_config
        for block_m in (64, 128, 256):
            for block_n in (32, 64, 128):
                for num_warps in (4, 8):
                    for num_stages in (2, 3, 4):
                        if num_stages * block_n > 384 or block_m * block_n > 128 * 128:
                            continue
                        config = paged_prefill_triton.PrefillConfig(
                            block_m, block_n, num_warps, num_stages
                        )
                        paged_prefill_triton.choose_config = lambda *a, c=config: c
                        try:
                            us = time_us(
                                [lambda: backend._attend(query, paged.kv, paged.batch, spec)], 2
                            )
                        except Exception as error:  # too much shared memory
                            print(tuple(config), str(error).splitlines()[0][:80])
                            continue
                        flops = 4 * length * (length + 1) / 2 * 32 * 128
                        report("sweep chunks", f"{length}", us, flops=flops, note=str(config))
        paged_prefill_triton.choose_config = choose


def sweep_decode() -> None:
    shape, spec = QWEN3_8B, AttentionSpec(32, 8, 128, 128**-0.5)
    choose = paged_decode_triton.choose_config
    for n, context in ((1, 512), (1, 16_384), (16, 16_384), (256, 1024)):
        num_bytes = 4 * n * context * 8 * 128
        pages = [Paged.make(shape, [1] * n, [context] * n, n) for _ in range(copies_of(num_bytes))]
        query, backend = random(n, 32, 128), TritonAttention()
        for block_n in (32, 64, 128):
            for num_warps in (2, 4, 8):
                for num_stages in (2, 3, 4, 5):
                    config = paged_decode_triton.DecodeConfig(block_n, num_warps, num_stages)
                    paged_decode_triton.choose_config = lambda *a, c=config: c
                    try:
                        us = time_us(
                            [lambda p=p: backend._attend(query, p.kv, p.batch, spec) for p in pages]
                        )
                    except Exception as error:
                        print(tuple(config), str(error).splitlines()[0][:80])
                        continue
                    where = f"{n} x {context}"
                    report("sweep decode", where, us, num_bytes=num_bytes, note=str(config))
        paged_decode_triton.choose_config = choose
        for per_processor in (1, 2, 4, 8):
            for shortest in (64, 128, 256, 512):
                with (
                    setting(paged_decode_triton, "PROGRAMS_PER_PROCESSOR", per_processor),
                    setting(paged_decode_triton, "MIN_SPLIT_LEN", shortest),
                ):
                    us = time_us(
                        [lambda p=p: backend._attend(query, p.kv, p.batch, spec) for p in pages]
                    )
                note = f"{per_processor} programs per SM, at least {shortest} keys"
                report("sweep splits", f"{n} x {context}", us, num_bytes=num_bytes, note=note)


def sweep_linear() -> None:
    for shape in MODELS:
        for name, (out_features, in_features) in shape.linears().items():
            num_bytes = 2 * out_features * in_features
            weights = [random(out_features, in_features) for _ in range(copies_of(num_bytes))]
            for n in (1, 2, 4, 8, 16):
                x = random(n, in_features)
                plans: list[Any] = []
                if n <= 4:
                    plans += [
                        gemv_triton.GemvPlan(rows, block_k, num_warps)
                        for rows in (1, 2, 4, 8)
                        for block_k in (512, 1024, 2048, 4096)
                        for num_warps in (2, 4, 8)
                        if rows * block_k <= 8192 // (1 if n == 1 else 2)
                        and rows * block_k >= 1024
                        and block_k <= in_features
                    ]
                if n >= 2:
                    plans += [
                        gemv_triton.SkinnyPlan(block_n, block_k, num_warps, num_stages)
                        for block_n in (16, 32, 64)
                        for block_k in (64, 128, 256)
                        for num_warps in (2, 4)
                        for num_stages in (3, 4, 5)
                        if block_n * block_k * num_stages <= 49_152
                    ]
                other = time_us([lambda w=w, x=x: F.linear(x, w) for w in weights])
                timed = []
                for plan in plans:
                    try:
                        us = time_us(
                            [
                                lambda w=w, x=x, p=plan: gemv_triton.run(p, x, w, None, Around())
                                for w in weights
                            ]
                        )
                        timed.append((us, plan))
                    except Exception as error:
                        print(plan, str(error).splitlines()[0][:80])
                for us, plan in sorted(timed, key=lambda item: item[0])[:4]:
                    where = f"{shape.name} {name} M={n}"
                    report(
                        "sweep linear", where, us, num_bytes=num_bytes,
                        alternative=other, note=str(plan),
                    )  # fmt: skip
            del weights


CHECKS = (check_elementwise, check_attention, check_linear, check_sampling, check_moe, check_models)
TIMINGS = (
    time_ceilings,
    time_models,
    time_attention,
    time_linear,
    time_elementwise,
    time_sampling,
    time_moe,
)
SWEEPS = (sweep_prefill, sweep_decode, sweep_linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time configurations instead")
    parser.add_argument("--only", nargs="*", default=[], help="sections, e.g. check_linear")
    parser.add_argument("--json", type=Path, help="write all results there")
    options = parser.parse_args()
    torch.manual_seed(0)
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    sections = SWEEPS if options.sweep else CHECKS + TIMINGS
    header = (
        f"{'kernel':18s} {'shape':34s} {'us':>10s} {'rate':>13s} {'share':>6s} {'torch us':>10s}"
    )
    for section in sections:
        name = section.__name__
        if options.only and name not in options.only and name != "time_ceilings":
            continue
        start = time.perf_counter()
        print(f"\n== {name}\n{header if not name.startswith('check') else ''}")
        try:
            section()
        except Exception:  # the other sections still count
            traceback.print_exc()
            records.append({"failed": name})
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"== {name} took {time.perf_counter() - start:.1f} s", flush=True)
        if options.json:
            device = torch.cuda.get_device_name()
            options.json.write_text(json.dumps({"device": device, "records": records}, indent=1))
    wrong = [r for r in records if r.get("ok") is False or "failed" in r]
    print(f"\n{len(wrong)} checks failed" if wrong else "\nall checks passed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
