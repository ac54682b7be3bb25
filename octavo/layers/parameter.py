"""Parameters that wait for a checkpoint, and the slots through which they are filled."""

from __future__ import annotations

import torch
from torch import nn

from octavo.errors import WeightsError
from octavo.weights.slots import WeightSlot


def empty_parameter(*shape: int) -> nn.Parameter:
    """Uninitialised, on the default device, in the default dtype, without gradient."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def slot_of(parameter: nn.Parameter, start: int = 0, length: int | None = None) -> WeightSlot:
    """A slot that fills the parameter, or `length` rows of it from row `start`."""
    num_rows = parameter.shape[0] if length is None else length
    shape = (num_rows, *parameter.shape[1:])

    def load(tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) != shape:  # copy_ would broadcast
            raise WeightsError(f"Expected a tensor of shape {shape}, got {tuple(tensor.shape)}.")
        parameter.narrow(0, start, num_rows).copy_(tensor)

    return WeightSlot(shape, load)
