"""Staging without a GPU: the same path, but for pinned memory and streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from octavo.weights import staging
from octavo.weights.safetensors import iter_safetensors
from octavo.weights.staging import staged

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def anything(name: str, tensor: torch.Tensor) -> bool:
    return True


def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-100, 100, shape).to(dtype)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 100)
    monkeypatch.setattr(staging, "AHEAD_BYTES", 700)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 20), max_size=3).map(tuple),
            st.sampled_from(DTYPES),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_the_same_tensors_in_the_same_order(kinds) -> None:
    tensors = []
    for i, (shape, dtype, is_turned) in enumerate(kinds):
        tensor = make(shape, dtype)
        tensors.append((str(i), tensor.transpose(0, -1) if is_turned and shape else tensor))
    got = list(staged(iter(tensors), CPU, anything))
    assert [name for name, _ in got] == [name for name, _ in tensors]
    for (_, there), (_, tensor) in zip(got, tensors, strict=True):
        assert there.dtype == tensor.dtype
        assert torch.equal(there, tensor)
        assert there.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_only_so_much_is_ahead() -> None:
    asked: list[int] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(20):
            asked.append(i)
            yield str(i), make((50,), torch.float32)

    for i, _ in enumerate(staged(tensors(), CPU, anything)):
        assert len(asked) <= i + 5  # 200 bytes each


def test_a_tensor_larger_than_that_comes_through() -> None:
    large = make((1000,), torch.float32)
    got = dict(staged(iter([("a", large), ("b", large[:3]), ("c", large)]), CPU, anything))
    assert torch.equal(got["c"], large)


def test_what_nobody_wants_is_handed_on_as_it_is() -> None:
    tensors = [(name, make((50,), torch.float32)) for name in "abc"]
    got = dict(staged(iter(tensors), CPU, lambda name, tensor: name != "b"))
    assert [got[name] is tensor for name, tensor in tensors] == [False, True, False]


def test_so_is_what_there_is_no_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [(str(i), make((50,), torch.float32)) for i in range(6)]
    like = staging._Memory.like

    def sometimes(self, tensor):
        return None if tensor is tensors[3][1] else like(self, tensor)

    monkeypatch.setattr(staging._Memory, "like", sometimes)
    got = list(staged(iter(tensors), CPU, anything))
    assert [there is tensor for (_, there), (_, tensor) in zip(got, tensors, strict=True)] == [
        i == 3 for i in range(6)
    ]


def test_a_copy_that_fails_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self, source, target):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(staging._Carrier, "__call__", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        list(staged(iter([("a", make((3,), torch.float32))]), CPU, anything))


def test_what_reading_raises_is_raised() -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", make((3,), torch.float32)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(staged(tensors(), CPU, anything))


def test_whoever_stops_early_leaves_no_threads() -> None:
    tensors = ((str(i), make((50,), torch.float32)) for i in range(100))
    reading = staged(tensors, CPU, anything)
    next(reading)
    reading.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]


def test_tensors_outlive_their_file(tmp_path) -> None:
    state = {name: make((30, 7), torch.float32) for name in "abc"}
    for name, tensor in state.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    held = list(iter_safetensors(files))
    for file in files:
        file.unlink()
    assert all(torch.equal(tensor, state[name]) for name, tensor in held)
    assert held
