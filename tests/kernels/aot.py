"""Compile every kernel for GPUs that are not there.

Run as a program, without TRITON_INTERPRET: calls the launchers with tensors on the CPU, and where a
kernel would be launched, compiles it for an NVIDIA and an AMD target instead. Arguments: names of
cases; none: all. Prints one line per kernel and target.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.attention import AttentionSpec
from octavo.kernels import launch

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl", "launch_cooperative_grid")
seen: set[Any] = set()
target_name = ""


def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for `JITFunction.run`: the same specialisation, for the wanted target."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(self.params):
        value = values[parameter.name]
        kind = "constexpr"
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            kind = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, GluonDescriptor):
            dtype = POINTERS[value.base.dtype][1:]
            kind = f"tensordesc<{dtype}{list(value.block_shape)},{value.layout!r}>"
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    key = (self.fn.__name__, target_name, str(signature), str(constants), str(options))
    if key in seen:
        return
    seen.add(key)
    start = time.perf_counter()
    language = GluonASTSource if self.is_gluon() else ASTSource
    source = language(self, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target_name], options=options)
    binary = compiled.asm["cubin" if target_name == "sm_90" else "hsaco"]
    shared = compiled.metadata.shared
    assert len(binary) > 0
    assert shared <= (227 << 10 if target_name == "sm_90" else 64 << 10), shared
    seconds = time.perf_counter() - start
    print(f"{target_name} {self.fn.__name__} shared={shared} {options} {seconds:.1f}s", flush=True)


# ---- what to launch


def norm() -> None:
    from octavo.kernels import norm_triton

    x = torch.empty(3, 4096, dtype=torch.bfloat16)
    norm_triton.rms_norm(x, x[0], 1e-6, torch.empty_like(x), False)
    norm_triton.rms_norm(x, x[0], 1e-6, None, True)


def activation() -> None:
    from octavo.kernels import activation_triton

    for name in ("silu", "gelu", "gelu_pytorch_tanh"):
        activation_triton.gated_activation(torch.empty(3, 6144, dtype=torch.float16), name)


def qkv() -> None:
    from octavo.kernels import qkv_triton
    from octavo.kernels.qkv import HeadNorms, HeadTransform
    from octavo.kernels.rope import Rope

    for num_tokens, head_dim, rot_dim in ((1, 128, 128), (64, 96, 96), (64, 80, 32)):
        x = torch.empty(num_tokens, 48 * head_dim, dtype=torch.bfloat16)
        slots = torch.zeros(num_tokens, dtype=torch.int64)
        cache = torch.empty(4, 16, 8, head_dim, dtype=torch.bfloat16)
        rope = Rope(torch.empty(64, rot_dim), slots, x.dtype)
        norms = HeadNorms(x[0, :head_dim], x[0, :head_dim], 1e-6, False)
        for transform in (HeadTransform(rope, norms), HeadTransform(rope, None)):
            qkv_triton.rotate_and_store(x, 32, transform, cache, cache, slots)


def inputs() -> None:
    from octavo.kernels import decode_inputs_triton

    rows, tables = torch.zeros(3, dtype=torch.int64), torch.zeros(5, 7, dtype=torch.int32)
    decode_inputs_triton.take_inputs(rows, rows, tables, 16)


def attention() -> None:
    from octavo.kernels.paged_decode_triton import DecodeWorkspace, paged_decode
    from octavo.kernels.paged_prefill_triton import paged_prefill
    from octavo.kernels.shared_prefix_triton import attend_shared

    for spec in (
        AttentionSpec(32, 8, 128, 0.1),
        AttentionSpec(9, 3, 64, 0.1),
        AttentionSpec(32, 32, 96, 0.1, sliding_window=2047),
        AttentionSpec(8, 4, 256, 0.1, sliding_window=4096, logit_softcap=50.0),
    ):
        query = torch.empty(64, spec.num_heads, spec.head_dim, dtype=torch.bfloat16)
        cache = torch.empty(4, 16, spec.num_kv_heads, spec.head_dim, dtype=torch.bfloat16)
        table, lens = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        how = {"scale": 0.1, "window": spec.sliding_window, "softcap": spec.logit_softcap}
        for max_len in (64, 4096):
            rows = query[:2], query[:2], cache, cache, table, lens, max_len, DecodeWorkspace()
            paged_decode(*rows, **how)
        many = torch.zeros(64, 4, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
        paged_decode(query, query, cache, cache, *many, 4096, DecodeWorkspace(), **how)
        if spec.sliding_window is None or spec.logit_softcap is not None:
            how |= {"window": None}
            part = attend_shared(
                query[:2], cache, cache, table[0], lens, lens[:1], scale=0.1,
                softcap=spec.logit_softcap,
            )  # fmt: skip
            paged_decode(*rows, **how, shared=part)
            how |= {"window": spec.sliding_window}
        starts = torch.zeros(3, dtype=torch.int32)
        for max_query_len in (8, 2048):
            rows = query, query, cache, cache, table, starts, lens, 64, max_query_len
            paged_prefill(*rows, **how)


def packed() -> None:
    from octavo.kernels import packed_prefill_hopper
    from octavo.kernels.packed_prefill_triton import gather, packed_prefill

    starts = torch.zeros(3, dtype=torch.int32)
    for num_heads, head_dim in ((32, 128), (14, 64)):
        query = torch.empty(64, num_heads, head_dim, dtype=torch.bfloat16)
        cache = torch.empty(4, 16, 2, head_dim, dtype=torch.bfloat16)
        keys = gather(cache, cache, torch.zeros(2, 4, dtype=torch.int32), starts, 100)
        if target_name == "sm_90":  # elsewhere it is not launched
            where = keys, 0, 2 * head_dim, starts, starts, starts[1:]
            packed_prefill(query, query, *where, 64, 64, 2, 0.1)
            if head_dim == 128:
                packed_prefill_hopper.packed_prefill(query, query, *where, 64, 2, 0.1)


def gemv() -> None:
    from octavo.kernels import gemv_triton
    from octavo.kernels.linear import Around

    for num_tokens, out_features, in_features in (
        (1, 6144, 4096),
        (1, 1024, 3072),
        (4, 4096, 4096),
        (16, 6144, 4096),
        (16, 151936, 1024),
    ):
        x = torch.empty(num_tokens, 2 * in_features, dtype=torch.bfloat16)
        weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
        residual = torch.empty(num_tokens, out_features, dtype=torch.bfloat16)
        plan = gemv_triton.plan(num_tokens, out_features, in_features)
        assert plan is not None
        fused = [Around(norm=weight[0], residual=residual), Around()]
        if isinstance(plan, gemv_triton.GemvPlan):
            fused.append(Around(activation="silu", residual=residual))
        for around in fused:
            gemv_triton.run(plan, x, weight, None, around)


def sampling() -> None:
    from octavo.kernels import sampling_triton

    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.empty(3, 151_936, dtype=dtype)
        sampling_triton.argmax(logits)
        sampling_triton.token_logprobs(logits, torch.zeros(3, dtype=torch.int64))
    values, ids = torch.empty(3), torch.zeros(3, dtype=torch.int64)
    sampling_triton.sample(torch.empty(3, 151_936), values, ids, values, values, ids, ids)


def moe() -> None:
    from octavo.kernels import moe_triton

    for num_tokens in (1, 64, 512, 4096):
        x = torch.empty(num_tokens, 256, dtype=torch.bfloat16)
        gate_up = torch.empty(128, 2 * 96, 256, dtype=torch.bfloat16)
        logits = torch.empty(num_tokens, 128, dtype=torch.bfloat16)
        routing = moe_triton.route(logits, 8, True)
        moe_triton.run_experts(x, gate_up, torch.empty(128, 256, 96).bfloat16(), *routing, "silu")


def layers() -> None:
    from octavo.kernels.decode_layers import DecodeLayers, LayerTensors

    if target_name != "sm_90":  # elsewhere it is not launched
        return
    memory = torch.empty(1 << 21, dtype=torch.uint8)
    for dtype, group, kv_heads, head_dim, size, inner, has_bias in (
        (torch.bfloat16, 4, 8, 128, 4096, 12288, False),
        (torch.bfloat16, 2, 8, 128, 1024, 3072, False),
        (torch.float16, 5, 8, 128, 5120, 13824, True),
        (torch.bfloat16, 4, 8, 64, 2048, 8192, False),
        (torch.bfloat16, 1, 32, 128, 4096, 24576, False),
    ):
        heads, qkv = group * kv_heads * head_dim, (group + 2) * kv_heads * head_dim
        base = memory.view(dtype)  # distances between tensors are counted

        def tensor(*shape: int, base: torch.Tensor = base) -> torch.Tensor:
            return base[:1].expand(shape)

        cache = base[: 4 * 16 * kv_heads * head_dim].view(4, 16, kv_heads, head_dim)
        norm = tensor(head_dim) if size != 2048 and not has_bias else None
        weights = ((qkv, size), (size, heads), (2 * inner, size), (size, inner), (size,), (size,))
        tensors = [tensor(*shape) for shape in weights]
        bias = tensor(qkv) if has_bias else None
        layer = LayerTensors(*tensors, norm, norm, bias, cache, cache)
        for activation in ("silu", "gelu") if size == 1024 else ("silu",):
            stack = DecodeLayers([layer], activation=activation, eps=1e-6, scale=0.1)
            lens = torch.zeros(1, dtype=torch.int32)
            stack.run(tensors[4], lens, lens, lens.long(), torch.empty(64, head_dim))


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (norm, activation, qkv, inputs, attention, packed, layers, gemv, sampling, moe)
}


def main() -> None:
    global target_name
    JITFunction.run = compile_instead
    launch.overlaps = lambda x: target_name == "sm_90"
    launch.is_amd = lambda: target_name != "sm_90"
    for name in TARGETS:
        target_name = name
        for case in sys.argv[1:] or CASES:
            CASES[case]()


if __name__ == "__main__":
    main()
