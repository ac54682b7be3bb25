"""The gated feed-forward layer: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from octavo.errors import UnsupportedModelError
from octavo.layers.linear import Linear, MergedLinear
from octavo.weights.slots import WeightSlot

Activation = Callable[[torch.Tensor], torch.Tensor]

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
}


def get_activation(name: str) -> Activation:
    """The activation with transformers' name for it.

    Raises:
        UnsupportedModelError: there is none; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"Activation {name!r} is not implemented; supported: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


class GatedMLP(nn.Module):
    """Gate and up projection as one matmul.

    `stored_as`: checkpoint name of a gate-and-up tensor that is already fused.
    """

    def __init__(
        self,
        size: int,
        intermediate_size: int,
        activation: str,
        *,
        bias: bool = False,
        stored_as: str | None = None,
    ) -> None:
        super().__init__()
        self.activation = get_activation(activation)
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(size, parts, bias=bias, stored_as=stored_as)
        self.down_proj = Linear(intermediate_size, size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, size] -> [num_tokens, size]"""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)  # type: ignore[no-any-return]

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {
            **self.gate_up_proj.weight_slots(prefix),
            **self.down_proj.weight_slots(f"{prefix}.down_proj"),
        }
