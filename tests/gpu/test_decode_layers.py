"""All layers in one launch, against the layers one by one, and both against float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_engines import FAMILIES, QWEN3, requests, run, write_model

from octavo.attention import get_backend
from octavo.attention.base import AttentionBatch, KVLayer
from octavo.attention.context import ForwardContext
from octavo.kernels import launch
from octavo.kernels.decode_layers import DecodeLayers
from octavo.models import create_model
from octavo.models.decoder import DecoderLM
from octavo.models.fused_decode import FusedDecode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not launch.has_warpgroups(torch.device("cuda", 0)),
        reason="needs a Hopper GPU",
    ),
]

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 32, 100, 3072
LENS = (1, 2, 63, 64, 65, 66, 600, 1024, 1025, 1026, 3000)


def _config(
    size: int, inner: int, heads: int, kv_heads: int, head_dim: int, **others: Any
) -> dict[str, Any]:
    return QWEN3 | {
        "hidden_size": size,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_LEN,
        **others,
    }


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
SHAPES = {
    "qwen3-0.6b": _config(1024, 3072, 16, 8, 128),
    "qwen3-8b": _config(4096, 12288, 32, 8, 128, num_hidden_layers=2),
    "llama-1b": _config(2048, 8192, 32, 8, 64, **LLAMA),
    "qwen2.5-14b": _config(5120, 13824, 40, 8, 128, num_hidden_layers=2, **QWEN2),  # biases
    "head for head": _config(512, 1280, 8, 8, 64, hidden_act="gelu_pytorch_tanh", **LLAMA),
    "many heads": _config(2048, 24576, 32, 32, 64, hidden_act="gelu", **LLAMA),
}


def _batch(seq_len: int, block_tables: torch.Tensor) -> AttentionBatch:
    position = seq_len - 1
    block = block_tables[0, position // BLOCK_SIZE].long()
    device = block_tables.device
    return AttentionBatch(
        slot_mapping=(block * BLOCK_SIZE + position % BLOCK_SIZE)[None],
        query_starts=torch.arange(2, dtype=torch.int32, device=device),
        seq_lens=torch.tensor([seq_len], dtype=torch.int32, device=device),
        block_tables=block_tables,
        num_decodes=1,
        max_query_len=1,
        max_seq_len=MAX_LEN,
        query_lens=(1,),
        host_seq_lens=(seq_len,),
    )


def _make(config: dict[str, Any], dtype: torch.dtype) -> DecoderLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device("cuda", 0):
        model = create_model(config, MAX_LEN)
    torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    assert isinstance(model, DecoderLM)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_one_launch_is_as_exact_as_many(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config, device = SHAPES[shape], torch.device("cuda", 0)
    model, exact = _make(config, dtype), _make(config, torch.float32)
    for parameter, wide in zip(model.parameters(), exact.parameters(), strict=True):
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.uniform_(-1.5, 1.5)
        wide.copy_(parameter)
    cache_shape = (NUM_BLOCKS, BLOCK_SIZE, config["num_key_value_heads"], config["head_dim"])
    old = [
        KVLayer(*(torch.randn(cache_shape, device=device).to(dtype) for _ in range(2)))
        for _ in model.attention_specs
    ]
    caches = [tuple(KVLayer(layer.k.clone(), layer.v.clone()) for layer in old) for _ in range(2)]
    wide_cache = tuple(KVLayer(layer.k.float(), layer.v.float()) for layer in old)
    tables = torch.randperm(NUM_BLOCKS - 1, device=device)[None].to(torch.int32) + 1
    token = torch.tensor([17], device=device)
    triton, plain_torch = get_backend("triton"), get_backend("torch")

    for seq_len in LENS:
        position, batch = torch.tensor([seq_len - 1], device=device), _batch(seq_len, tables)
        fused = model(token, position, ForwardContext(batch, caches[0], triton))
        assert model.fused_decode._kernel is not None
        again = model(token, position, ForwardContext(batch, caches[0], triton))
        assert torch.equal(fused, again)
        with monkeypatch.context() as patch:
            patch.setattr(model.fused_decode, "run", lambda *_: None)
            plain = model(token, position, ForwardContext(batch, caches[1], triton))
        right = exact(token, position, ForwardContext(batch, wide_cache, plain_torch))
        error, usual = ((x.float() - right).norm() / right.norm() for x in (fused, plain))
        print(f"{shape} {dtype} {seq_len}: {error:.2e}, layer by layer {usual:.2e}")
        assert error < 1.25 * usual + 1e-4

        slot = int(batch.slot_mapping)
        for layer, (one, many, wide) in enumerate(zip(*caches, wide_cache, strict=True)):
            for a, b, c in ((one.k, many.k, wide.k), (one.v, many.v, wide.v)):
                new, usual_new, right_new = (x.flatten(0, 1)[slot].float() for x in (a, b, c))
                error = (new - right_new).norm() / right_new.norm()
                usual = (usual_new - right_new).norm() / right_new.norm()
                assert error < 1.5 * usual + 1e-4, f"layer {layer}: {error} {usual}"
                a.flatten(0, 1)[slot] = b.flatten(0, 1)[slot]
                assert torch.equal(a, b)  # nothing else was touched


@torch.inference_mode()
def test_a_graph_follows_its_inputs() -> None:
    """Length, blocks and slot are read from memory when it runs."""
    torch.manual_seed(0)
    model, device = _make(SHAPES["qwen3-0.6b"], torch.bfloat16), torch.device("cuda", 0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.05)
    cache = tuple(
        KVLayer(
            *(torch.randn(NUM_BLOCKS, BLOCK_SIZE, 8, 128, device=device).bfloat16() for _ in "kv")
        )
        for _ in model.attention_specs
    )
    tables = torch.randperm(NUM_BLOCKS - 1, device=device)[None].to(torch.int32) + 1
    static, backend = _batch(1, tables.clone()), get_backend("triton")
    token, position = torch.tensor([3], device=device), torch.tensor([0], device=device)
    context = ForwardContext(static, cache, backend)
    model(token, position, context)
    assert model.fused_decode._kernel is not None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(token, position, context)
    for seq_len in (700, 5, 2000):
        batch = _batch(seq_len, tables.roll(seq_len, 1))
        for name in ("slot_mapping", "seq_lens", "block_tables"):
            getattr(static, name).copy_(getattr(batch, name))
        position.fill_(seq_len - 1)
        graph.replay()
        expected = model(token, position, ForwardContext(batch, cache, backend))
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("dtype", "options", "is_fused"),
    [
        ("bfloat16", {}, True),
        ("float16", {"enforce_eager": True}, True),
        ("bfloat16", {"attention_backend": "torch"}, False),
        ("float32", {}, False),
        ("bfloat16", {"model": FAMILIES["mistral"]}, False),  # a window
    ],
    ids=["graph", "eager", "torch", "float32", "window"],
)
def test_an_engine_decodes_a_lone_request_so(
    tmp_path: Path,
    dtype: str,
    options: dict[str, Any],
    is_fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And chooses, almost everywhere, the tokens that it chooses layer by layer."""
    options = dict(options)
    config = QWEN3 | options.pop("model", {}) | {"num_key_value_heads": 8}
    folder = write_model(tmp_path / "model", config)
    options |= {"dtype": dtype, "load_format": "auto", "max_num_seqs": 1}
    work = requests(8, seed=3, plain=True)
    runs = []
    original = DecodeLayers.run

    def noting(self: DecodeLayers, *args: torch.Tensor) -> torch.Tensor:
        runs.append(torch.cuda.is_current_stream_capturing())
        return original(self, *args)

    monkeypatch.setattr(DecodeLayers, "run", noting)
    tokens = run(folder, work, **options)
    assert any(runs) == (is_fused and "enforce_eager" not in options)
    assert bool(runs) == is_fused
    monkeypatch.setattr(FusedDecode, "run", lambda *_: None)
    plain = run(folder, work, **options)
    pairs = [(a, b) for i in tokens for a, b in zip(tokens[i], plain[i], strict=False)]
    assert len(pairs) > 100
    assert sum(a == b for a, b in pairs) / len(pairs) > 0.8
