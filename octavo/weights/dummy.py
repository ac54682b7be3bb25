"""Random weights: for benchmarks of shapes whose checkpoint is not at hand, and for tests."""

from __future__ import annotations

import torch
from torch import nn

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
