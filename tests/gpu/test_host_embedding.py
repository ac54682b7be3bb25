"""Embeddings that stay in the host's memory, read from there by a GPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from support.small_engines import QWEN3

from octavo.checkpoint import locate
from octavo.config import EngineArgs
from octavo.engine.build import build_core
from octavo.layers.embedding import Embedding
from octavo.layers.host import (
    HostMethod,
    LockError,
    _Locked,
    plan_embedding_on_host,
    settle_on_host,
)
from octavo.models import create_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_those_that_were_loaded(source: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.randn(5000, 96).to(dtype)
    for _ in range(3):  # what is let go can be taken again
        with device:
            embedding = Embedding(5000, 96)
            embedding.change_method(HostMethod())
        assert settle_on_host(embedding, 1 << 40) == 5000 * 96 * 4
        before = torch.cuda.memory_allocated(device)
        (slot,) = embedding.weight_slots("embed").values()
        with torch.inference_mode():
            slot.load(values.to(source))
            ids = torch.randint(0, 5000, (700,), device=device)
            rows = embedding(ids)
            assert rows.device == device
            assert torch.equal(rows.cpu(), values[ids.cpu()].to(torch.get_default_dtype()))
            del rows, ids
        assert torch.cuda.memory_allocated(device) == before
        del embedding, slot
        gc.collect()
        assert not any(type(held) is _Locked for held in gc.get_objects())


def test_a_refusal_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are locked already cannot be locked again."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows = torch.empty(5000, 96)
    locked = _Locked(rows, device)
    with device:
        embedding = Embedding(5000, 96)
        embedding.change_method(HostMethod())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: rows)
        with pytest.raises(LockError):
            embedding.method.settle(embedding)
    assert torch.ones(3, device=device).sum().item() == 3
    del locked


def test_the_gpu_is_spared_its_bytes() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    with device:
        model = create_model(QWEN3 | {"vocab_size": 400_000}, 100)
        embedding = plan_embedding_on_host(model)
    assert embedding is not None
    spared = settle_on_host(embedding, 1 << 40)
    assert spared == 400_000 * 256 * 4
    torch.cuda.empty_cache()
    rest = sum(parameter.nbytes for parameter in model.parameters()) - spared
    # Segments of 2 to 20 MB.
    assert torch.cuda.memory_reserved(device) - before < rest + (24 << 20)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_an_engine_tells_of_it(tmp_path: Path, device: str) -> None:
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    taken = []
    for on_host in (True, False):
        args = EngineArgs.from_options(
            model=str(tmp_path), load_format="dummy", embedding_on_host=on_host, device=device
        )
        core = build_core(args, locate(str(tmp_path), load_format="dummy"))
        taken.append(core.info.memory_bytes)
        core.close()
    num_bytes = QWEN3["vocab_size"] * QWEN3["hidden_size"] * 2
    assert taken[0]["host"] == taken[1]["weights"] - taken[0]["weights"] == num_bytes
    assert "host" not in taken[1]
