"""Each kernel against a reference in higher precision, on fresh random inputs."""

# closures are called before the loop goes on

from __future__ import annotations

import torch

from benchmarks.kernels.measure import (
    DEVICE,
    DTYPE,
    QWEN3_8B,
    Paged,
    Shape,
    exact_attention,
    poison,
    random,
    records,
    setting,
)
from octavo.attention import AttentionSpec, ForwardContext, KVLayer, TorchAttention
from octavo.attention.triton_backend import TritonAttention
from octavo.kernels import (
    activation_triton,
    gemv_triton,
    launch,
    moe,
    moe_triton,
    norm_triton,
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
        got = activation_triton.gated_activation(gate_up.clone(), name)
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
    from octavo.kernels.random import uniforms

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


CHECKS = (check_elementwise, check_attention, check_linear, check_sampling, check_moe, check_models)
