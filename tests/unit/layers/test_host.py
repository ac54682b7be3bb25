"""Which embeddings leave the GPU; that they are read there is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from support.small_engines import FAMILIES, QWEN3
from torch import nn

from octavo.layers.host import HostMethod, keep_embedding_on_host
from octavo.models import create_model

DEVICE = torch.device("cpu")


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is nothing to lock memory for: it is seen as it is."""
    monkeypatch.setattr("octavo.layers.host._seen_from", lambda device, tensor: tensor)


@pytest.mark.usefixtures("stays")
def test_an_embedding_of_its_own_moves() -> None:
    model = create_model(QWEN3, 100)
    names = list(model.weight_slots())
    num_bytes = keep_embedding_on_host(model, DEVICE, 1 << 40)
    assert num_bytes == QWEN3["vocab_size"] * QWEN3["hidden_size"] * 4
    assert list(model.weight_slots()) == names
    values = torch.randn(QWEN3["vocab_size"], QWEN3["hidden_size"])
    model.weight_slots()["model.embed_tokens.weight"].load(values)
    assert torch.equal(model.embed_tokens(torch.tensor([3, 999])), values[[3, 999]])
    on_host = [m for m in model.modules() if isinstance(getattr(m, "method", None), HostMethod)]
    assert on_host == [model.embed_tokens]


@pytest.mark.usefixtures("stays")
def test_one_that_the_head_multiplies_by_stays() -> None:
    model = create_model(QWEN3 | FAMILIES["llama"], 100)
    assert keep_embedding_on_host(model, DEVICE, 1 << 40) == 0
    assert not isinstance(model.embed_tokens.method, HostMethod)


def test_one_for_which_no_memory_can_be_locked_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("octavo.layers.host._seen_from", refuse)
    model = create_model(QWEN3, 100)
    weight = model.embed_tokens.weight
    assert keep_embedding_on_host(model, DEVICE, 1 << 40) == 0
    assert isinstance(model.embed_tokens.weight, nn.Parameter)
    assert model.embed_tokens.weight.shape == weight.shape
    assert "model.embed_tokens.weight" in model.weight_slots()
    assert "stays on the GPU: out of memory" in caplog.text


@pytest.mark.usefixtures("stays")
def test_one_for_which_the_host_has_no_room_stays() -> None:
    model = create_model(QWEN3, 100)
    num_bytes = model.embed_tokens.weight.nbytes
    assert keep_embedding_on_host(model, DEVICE, 2 * num_bytes - 1) == 0
    assert keep_embedding_on_host(model, DEVICE, 2 * num_bytes) == num_bytes
