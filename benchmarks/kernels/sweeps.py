"""Configurations of the kernels that have some, timed one after the other."""

# ruff: noqa: B023  # closures are called before the loop goes on

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from benchmarks.kernels.measure import (
    MODELS,
    QWEN3_8B,
    Paged,
    copies_of,
    random,
    report,
    setting,
    time_us,
)
from octavo.attention import AttentionSpec
from octavo.attention.triton_backend import TritonAttention
from octavo.kernels import (
    gemv_triton,
    paged_decode_triton,
    paged_prefill_triton,
)
from octavo.kernels.linear import Around


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


SWEEPS = (sweep_prefill, sweep_decode, sweep_linear)
