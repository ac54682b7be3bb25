"""A token embedding in the host's memory, of which a GPU reads the rows that a step asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

from octavo.errors import ConfigError
from octavo.layers.embedding import Embedding, TiedMethod
from octavo.layers.linear import DENSE, DenseMethod, MatrixLayer
from octavo.layers.parameter import slot_of
from octavo.log import get_logger
from octavo.weights.slots import WeightSlot

logger = get_logger(__name__)


class HostMethod(DenseMethod):
    """The weight in memory of the host that a GPU reads in place, without a copy of its own.

    Only for what is looked up: a step fetches one row a token. Until `settle`, a row of zeros on
    the GPU stands in for all: compiling kernels need not wait until the memory is locked.
    """

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        row = torch.zeros(1, in_features)
        layer.weight = nn.Parameter(row.expand(out_features, -1), requires_grad=False)

    def settle(self, layer: nn.Module) -> None:
        """Take and lock the memory. Raises LockError if the system does not let that much be."""
        stand_in = layer.get_parameter("weight")
        rows = torch.empty(stand_in.shape, dtype=stand_in.dtype, device="cpu")
        rows.zero_()  # by several threads, where locking would fetch page after page
        there = _seen_from(stand_in.device, rows)
        self._rows = nn.Parameter(rows, requires_grad=False)
        layer.weight = nn.Parameter(there, requires_grad=False)

    def slots(self, layer: nn.Module, name: str, start: int, length: int) -> dict[str, WeightSlot]:
        slot = slot_of(self._rows, start, length)
        return {f"{name}.weight": dataclasses.replace(slot, on_host=True)}


class LockError(Exception):
    """Memory of the host cannot be locked for a GPU."""


def plan_embedding_on_host(model: nn.Module) -> Embedding | None:
    """Have the model's embedding on the host, unless its head multiplies by it. It has to settle
    before weights are loaded.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MatrixLayer)]
    tied = {layer.method.embedding for layer in layers if isinstance(layer.method, TiedMethod)}
    for layer in layers:
        if isinstance(layer, Embedding) and layer not in tied:
            layer.change_method(HostMethod())
            return layer
    return None


def settle_on_host(layer: Embedding, free_bytes: int | None) -> int:
    """Give the embedding its memory: the host's, unless that is more than half of its `free_bytes`;
    None: it has to be. Returns the bytes that the GPU is spared.

    Raises:
        ConfigError: it has to be, and cannot.
    """
    weight, method = layer.get_parameter("weight"), layer.method
    num_bytes = weight.nbytes
    try:
        if free_bytes is not None and 2 * num_bytes > free_bytes:
            raise LockError("too little memory is free on the host")
        assert isinstance(method, HostMethod)
        method.settle(layer)
    except LockError as error:
        if free_bytes is None:
            raise ConfigError(
                f"embedding_on_host is not possible: {error}. Leave it out."
            ) from error
        logger.warning("the embedding stays on the GPU: %s", error)
        layer.method = DENSE
        dense = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        layer.weight = nn.Parameter(dense, requires_grad=False)
        return 0
    logger.info("the embedding's %.1f GB are in the host's memory", num_bytes / 1e9)
    return num_bytes


class _Locked:
    """While it lives, a CPU tensor's pages stay where they are, so that a GPU can read them.

    A tensor that is made of its `__cuda_array_interface__` keeps it alive.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device) -> None:
        result = int(_cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if result:
            _forget_error(device)
            raise LockError(f"CUDA refuses to lock {tensor.nbytes:,} bytes (error {result})")
        weakref.finalize(self, _unlock, tensor, device).atexit = False
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
        }


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unlock(tensor: torch.Tensor, device: torch.device) -> None:
    with contextlib.suppress(RuntimeError):  # the GPU may be beyond help
        torch.cuda.synchronize(device)  # steps under way may read it
    if int(_cudart().cudaHostUnregister(tensor.data_ptr())):
        _forget_error(device)


def _forget_error(device: torch.device) -> None:
    """A call that fails leaves its error for the next kernel launch of this thread to find."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device=device)


def _seen_from(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of `device`."""
    with torch.cuda.device(device):
        there = torch.as_tensor(_Locked(tensor, device), device=device)
    return there.view(tensor.dtype).view(tensor.shape)
