"""Unit tests work on tiny tensors: more than one thread only makes them wait for each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:  # a module that does not use it shall not pay for its import
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
