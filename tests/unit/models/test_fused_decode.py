"""Which layers a kernel for all of them is given; what it does is tested on a GPU."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_engines import FAMILIES, QWEN3

from octavo.attention.base import KVLayer
from octavo.kernels import decode_layers, launch
from octavo.kernels.decode_layers import LayerTensors, takes
from octavo.models import create_model
from octavo.models.decoder import DecoderLM
from octavo.models.fused_decode import FusedDecode


def _make(**config: object) -> DecoderLM:
    with torch.device("meta"):
        model = create_model(QWEN3 | config, 64)
    assert isinstance(model, DecoderLM)
    return model


def _is_plain(model: DecoderLM) -> bool:
    cache = torch.empty(1)
    return all(layer.plain_tensors(KVLayer(cache, cache)) is not None for layer in model.layers)


def test_plain_families() -> None:
    plain = {name for name, config in FAMILIES.items() if _is_plain(_make(**config))}
    assert plain == {
        "qwen2",
        "qwen3-wide",
    }  # others: windows, experts, more biases


@pytest.mark.parametrize(
    ("config", "is_plain"),
    [
        ({}, True),
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, False),
        ({"attention_bias": True}, False),  # of the output, too
        (FAMILIES["mistral"] | {"sliding_window": None}, True),
        (FAMILIES["mistral"] | {"sliding_window": 32}, False),
        (FAMILIES["llama"] | {"attention_bias": False}, False),
        (FAMILIES["llama"] | {"mlp_bias": False}, False),
        (FAMILIES["llama"] | {"attention_bias": False, "mlp_bias": False}, True),
    ],
)
def test_plain_layers(config: dict[str, object], is_plain: bool) -> None:
    assert _is_plain(_make(**config)) == is_plain


@pytest.mark.parametrize("change", ["add_one", "eps", "head eps", "softcap", "method"])
def test_a_layer_of_its_own_kind(change: str) -> None:
    model = _make()
    layer = model.layers[1]
    if change == "add_one":
        layer.post_attention_layernorm.add_one = True
    elif change == "eps":
        layer.post_attention_layernorm.eps = 1e-5
    elif change == "head eps":
        layer.self_attn.q_norm.eps = 1e-5
    elif change == "softcap":
        spec = layer.self_attn.attention.spec
        layer.self_attn.attention.spec = type(spec)(4, 2, 64, 0.1, logit_softcap=5.0)
    else:
        layer.mlp.down_proj.method = object()
    assert not _is_plain(model)


def _layer(
    heads: int = 16,
    kv_heads: int = 8,
    head_dim: int = 64,
    size: int = 512,
    inner: int = 768,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype = torch.bfloat16,
    offset: int = 0,
) -> LayerTensors:
    memory = torch.empty(1 << 21, dtype=dtype)  # distances between tensors are counted

    def tensor(*shape: int, offset: int = 0) -> torch.Tensor:
        return memory[offset : offset + math.prod(shape)].view(shape)

    cache = tensor(2, 16, kv_heads, head_dim)
    cache = cache if cache_dtype == dtype else cache.to(cache_dtype)
    return LayerTensors(
        qkv=tensor((heads + 2 * kv_heads) * head_dim, size),
        out=tensor(size, heads * head_dim),
        gate_up=tensor(2 * inner, size),
        down=tensor(size, inner),
        input_norm=tensor(size, offset=offset),
        post_norm=tensor(size),
        query_norm=None,
        key_norm=None,
        qkv_bias=None,
        keys=cache,
        values=cache,
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that a CPU is such a GPU."""
    monkeypatch.setattr(launch, "has_warpgroups", lambda device: True)
    monkeypatch.setattr(decode_layers, "_load", lambda: decode_layers)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("shape", "is_taken"),
    [
        ({}, True),
        ({"dtype": torch.float16, "cache_dtype": torch.float16}, True),
        ({"dtype": torch.float32, "cache_dtype": torch.float32}, False),
        ({"cache_dtype": torch.float16}, False),
        ({"heads": 8, "head_dim": 128}, True),
        ({"heads": 40}, True),  # five to one
        ({"heads": 48}, False),  # six
        ({"kv_heads": 4}, False),
        ({"head_dim": 96}, False),
        ({"size": 448}, False),  # no multiple of 256
        ({"inner": 832}, False),
        ({"offset": 128}, True),
        ({"offset": 64}, False),
    ],
)
def test_which_shapes_are_taken(shape: dict[str, Any], is_taken: bool) -> None:
    layer = _layer(**shape)
    assert takes([layer, layer]) == is_taken


@pytest.mark.usefixtures("hopper")
def test_layers_have_to_be_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer()
    assert takes([layer])
    assert not takes([layer, layer._replace(query_norm=layer.input_norm[:64])])
    assert not takes([layer, layer._replace(down=layer.down[:, :512].contiguous())])
    assert not takes([layer._replace(down=layer.down.t().contiguous().t())])
    monkeypatch.setattr(decode_layers, "_load", lambda: None)
    assert not takes([layer])


def test_no_other_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_layers, "_load", lambda: decode_layers)
    assert not takes([_layer()])


def test_only_a_lone_token_is_given_to_it() -> None:
    model = _make()
    batch = SimpleNamespace(query_lens=(1,))
    asked = []

    class Asked(FusedDecode):
        def _find_kernel(self, kv: object, ropes: object) -> None:
            asked.append(kv)

    fused = Asked(list(model.layers))
    kv = [KVLayer(torch.empty(1), torch.empty(1)) for _ in model.layers]

    def run(rows: int = 1, **changes: Any) -> None:
        context = {
            "batch": batch, "kv": kv, "last_batch": None,
            "backend": SimpleNamespace(gives_up_decodes=True),
        } | changes  # fmt: skip
        assert fused.run(torch.empty(rows, 8), [], SimpleNamespace(**context)) is None

    run(2)
    run(batch=SimpleNamespace(query_lens=(1, 0)))
    run(last_batch=batch)
    run(backend=SimpleNamespace(gives_up_decodes=False))
    assert not asked
    run()
    run()
    assert asked == [kv]
    run(kv=[KVLayer(torch.empty(1), torch.empty(1)) for _ in model.layers])
    assert len(asked) == 2
