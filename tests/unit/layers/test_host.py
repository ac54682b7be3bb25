"""Which embeddings leave the GPU; that they are read there is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from support.small_engines import FAMILIES, QWEN3
from torch import nn

from octavo.errors import ConfigError
from octavo.layers.host import HostMethod, LockError, plan_embedding_on_host, settle_on_host
from octavo.models import create_model

IDS = torch.tensor([3, 999])
ROOM = 1 << 40


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is nothing to lock memory for: it is seen as it is."""
    monkeypatch.setattr("octavo.layers.host._seen_from", lambda device, tensor: tensor)


@pytest.mark.usefixtures("stays")
def test_an_embedding_of_its_own_moves() -> None:
    model = create_model(QWEN3, 100)
    size = model.embed_tokens.weight.shape
    layer = plan_embedding_on_host(model)
    assert layer is model.embed_tokens
    assert layer.weight.untyped_storage().nbytes() == size[1] * 4
    assert layer(IDS).eq(0).all()  # good enough for kernels to be compiled
    assert settle_on_host(layer, ROOM) == size.numel() * 4
    assert layer.weight.shape == size
    values = torch.randn(size)
    model.weight_slots()["model.embed_tokens.weight"].load(values)
    assert torch.equal(layer(IDS), values[IDS])
    on_host = [m for m in model.modules() if isinstance(getattr(m, "method", None), HostMethod)]
    assert on_host == [layer]


def test_one_that_the_head_multiplies_by_stays() -> None:
    model = create_model(QWEN3 | FAMILIES["llama"], 100)
    assert plan_embedding_on_host(model) is None
    assert not isinstance(model.embed_tokens.method, HostMethod)


@pytest.mark.parametrize("room", [ROOM, 0])
def test_one_for_which_there_is_no_memory_stays(
    room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
        raise LockError("it cannot be locked")

    monkeypatch.setattr("octavo.layers.host._seen_from", refuse)
    model = create_model(QWEN3, 100)
    size = model.embed_tokens.weight.shape
    layer = plan_embedding_on_host(model)
    assert layer is not None
    assert settle_on_host(layer, room) == 0
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.is_contiguous()
    values = torch.randn(size)
    model.weight_slots()["model.embed_tokens.weight"].load(values)
    assert torch.equal(layer(IDS), values[IDS])
    why = "it cannot be locked" if room else "too little memory is free on the host"
    assert f"stays on the GPU: {why}" in caplog.text


def test_one_that_has_to_move_and_cannot_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
        raise LockError("it cannot be locked")

    monkeypatch.setattr("octavo.layers.host._seen_from", refuse)
    layer = plan_embedding_on_host(create_model(QWEN3, 100))
    assert layer is not None
    with pytest.raises(ConfigError, match=r"embedding_on_host is not possible: it cannot be lo"):
        settle_on_host(layer, None)


@pytest.mark.usefixtures("stays")
def test_half_of_the_free_memory_is_the_most() -> None:
    layer = plan_embedding_on_host(create_model(QWEN3, 100))
    assert layer is not None
    assert settle_on_host(layer, 2 * layer.weight.nbytes) == layer.weight.nbytes
