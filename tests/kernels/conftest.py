"""Kernels run for real where there is a GPU, and in Triton's interpreter where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# Read when a kernel is decorated, so before any of ours is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs for real is a test of the GPU; see `make test-gpu`."""
    if not torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture(scope="session", autouse=True)
def interpreter_takes_new_numpy() -> None:
    """The interpreter of Triton 3.6 turns arrays of one element to int as numpy 2.4 no longer does;
    that of 3.9 squeezes them first, and so does this.
    """
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton").runtime.interpreter
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, and -inf is meant
        yield
