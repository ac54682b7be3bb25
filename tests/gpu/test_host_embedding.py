"""Embeddings that stay in the host's memory, read from there by a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from support.small_engines import QWEN3

from octavo.layers.embedding import Embedding
from octavo.layers.host import HostMethod, plan_embedding_on_host, settle_on_host
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
