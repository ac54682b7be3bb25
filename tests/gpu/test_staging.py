"""Weights on their way to a GPU while another thread takes and gives back memory there."""

from __future__ import annotations

import threading

import pytest
import torch

from octavo.weights import staging
from octavo.weights.staging import staged

pytestmark = pytest.mark.gpu


def test_nothing_is_overwritten_and_all_memory_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(staging, "AHEAD_BYTES", 24 << 20)
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for i in range(120):
        size = (1 << 10, 300 << 10, 3 << 20, 7 << 20)[i % 4] + i
        values = torch.randint(-128, 127, (size,), dtype=torch.int8, generator=generator)
        tensors.append((str(i), values))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    stop, kept = threading.Event(), []

    def disturb() -> None:
        while not stop.is_set():
            held = [torch.empty(n << 20, dtype=torch.uint8, device=device) for n in (1, 4, 16)]
            if len(kept) < 8:
                kept.append(held[1])

    other = threading.Thread(target=disturb)
    arrived = []
    with torch.inference_mode():
        other.start()
        try:
            for name, tensor in staged(iter(tensors), device, lambda name, tensor: True):
                torch.cuda._sleep(2_000_000)  # a millisecond: the copies below wait
                arrived.append((name, tensor.clone()))
        finally:
            stop.set()
            other.join()
    assert [name for name, _ in arrived] == [name for name, _ in tensors]
    for (_, there), (_, values) in zip(arrived, tensors, strict=True):
        assert torch.equal(there.cpu(), values)
    del there, tensor, arrived
    wanted = sum(held.nbytes for held in kept)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    more = torch.cuda.memory_reserved(device) - before
    assert more <= wanted + (24 << 20)  # segments of 2 to 20 MB


def test_the_second_gpu_will_do() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    tensors = [(str(i), torch.full((1000,), i)) for i in range(5)]
    for i, (_, there) in enumerate(staged(iter(tensors), device, lambda name, tensor: True)):
        assert there.device == device
        assert there.eq(i).all()
