"""A token embedding in the host's memory, of which a GPU reads the rows that a step asks for."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from octavo.layers.embedding import Embedding, TiedMethod
from octavo.layers.linear import DenseMethod, MatrixLayer
from octavo.layers.parameter import slot_of
from octavo.log import get_logger
from octavo.weights.slots import WeightSlot

logger = get_logger(__name__)


class HostMethod(DenseMethod):
    """The weight in memory of the host that `device` reads in place, without a copy of its own.

    Only for what is looked up: a step fetches one row a token.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        """Raises RuntimeError if the system does not let so much memory be locked."""
        rows = torch.empty(out_features, in_features, device="cpu")
        rows.zero_()  # by several threads, where locking would fetch page after page
        self._rows = nn.Parameter(rows, requires_grad=False)
        layer.weight = nn.Parameter(_seen_from(self._device, self._rows.data), requires_grad=False)

    def slots(self, layer: nn.Module, name: str, start: int, length: int) -> dict[str, WeightSlot]:
        return {f"{name}.weight": slot_of(self._rows, start, length)}


def keep_embedding_on_host(model: nn.Module, device: torch.device, free_bytes: int) -> int:
    """Move the embedding of a model whose weights are not loaded yet, unless its head multiplies by
    it or it would take more than half of the host's `free_bytes`. Returns the bytes that `device`,
    the default one here, is spared.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MatrixLayer)]
    tied = {layer.method.embedding for layer in layers if isinstance(layer.method, TiedMethod)}
    num_bytes = 0
    for layer in layers:
        if isinstance(layer, Embedding) and layer not in tied:
            num_bytes += _move(layer, device, free_bytes)
    return num_bytes


def _move(layer: Embedding, device: torch.device, free_bytes: int) -> int:
    num_bytes, dense = layer.get_parameter("weight").nbytes, layer.method
    if 2 * num_bytes > free_bytes:
        logger.info("the embedding stays on the GPU: too little memory is free on the host")
        return 0
    try:
        layer.change_method(HostMethod(device))
    except RuntimeError as error:
        logger.warning("the embedding stays on the GPU: %s", error)
        layer.change_method(dense)
        return 0
    return num_bytes


class _Locked:
    """While it lives, a CPU tensor's pages stay where they are, so that a GPU can read them.

    A tensor that is made of its `__cuda_array_interface__` keeps it alive.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        result = _cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        torch.cuda.check_error(int(result))
        weakref.finalize(self, _unlock, tensor).atexit = False
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
        }


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _unlock(tensor: torch.Tensor) -> None:
    _cudart().cudaHostUnregister(tensor.data_ptr())


def _seen_from(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of `device`."""
    with torch.cuda.device(device):
        there = torch.as_tensor(_Locked(tensor), device=device)
    return there.view(tensor.dtype).view(tensor.shape)
