"""Each kernel at the shapes of two models, beside what torch offers for the same."""

# ruff: noqa: B023  # closures are called before the loop goes on

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels.measure import (
    DEVICE,
    DTYPE,
    MODELS,
    QWEN3_8B,
    Paged,
    Shape,
    ceilings,
    copies_of,
    random,
    report,
    setting,
    time_us,
)
from octavo.attention import AttentionSpec, ForwardContext, KVLayer
from octavo.attention.triton_backend import TritonAttention
from octavo.kernels import (
    activation_triton,
    gemv_triton,
    launch,
    linear,
    moe_triton,
    norm_triton,
    paged_decode_triton,
    qkv_triton,
    sampling_triton,
)
from octavo.kernels.activation import gated_activation_torch
from octavo.kernels.linear import Around
from octavo.kernels.norm import rms_norm_torch
from octavo.kernels.qkv import HeadNorms, HeadTransform, rotate_and_store_torch
from octavo.kernels.rope import Rope
from octavo.models import create_model


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
        splits = paged_decode_triton.plan_splits(n, 8, context, launch.num_processors(query.device))
        report(
            "attention decode", f"8B {n} x {context}", us, num_bytes=num_bytes,
            note=f"{splits.most} splits",
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


TIMINGS = (
    time_ceilings,
    time_models,
    time_attention,
    time_linear,
    time_elementwise,
    time_sampling,
    time_moe,
)
