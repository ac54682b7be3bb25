"""Random weights: for benchmarks of shapes whose checkpoint is not at hand, and for tests."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from octavo.weights.slots import WeightSlot

_RANGE = 0.035  # uniform in ±0.035 has the usual initial deviation of 0.02, and is quick to draw


@torch.no_grad()
def fill_dummy(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place, on its own device; the same seed gives the same weights.

    Norm weights become 1, so that activations neither vanish nor blow up with depth.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise TypeError(f"dummy weights for {name} of dtype {parameter.dtype}")
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.uniform_(-_RANGE, _RANGE, generator=generators[device])


def fill_dummy_blocks(slots: Iterable[WeightSlot], seed: int) -> None:
    """Fill the slots that hold their weights in blocks, and so have no parameter."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for slot in slots:
        if slot.load_blocks is not None:
            slot.load(torch.empty(slot.shape).uniform_(-_RANGE, _RANGE, generator=generator))
