"""The gate of a feed-forward layer: act(gate) * up, where both lie side by side.

`gated_activation` picks an implementation by the device of its input; `gated_activation_torch` is
the twin. Names of activations are transformers'.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from octavo.kernels import launch
from octavo.kernels.cpu import ops as cpu

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
}


def gated_activation(gate_up: torch.Tensor, name: str) -> torch.Tensor:
    """[..., 2 * size] -> [..., size]: act(gate_up[..., :size]) * gate_up[..., size:].

    `name` is a key of ACTIVATIONS. May be written over the input, of which it is then a part.
    """
    if cpu.takes(gate_up):
        return cpu.gated_activation(gate_up, name)
    if launch.takes(gate_up):
        from octavo.kernels import activation_triton

        return activation_triton.gated_activation(gate_up, name)
    return gated_activation_torch(gate_up, name)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`gated_activation` with SiLU, as Llama has it."""
    return gated_activation(gate_up, "silu")


def gated_activation_torch(gate_up: torch.Tensor, name: str) -> torch.Tensor:
    """The twin."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[name](gate) * up
