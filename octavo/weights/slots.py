"""The contract between a model and whatever reads its checkpoint.

A model lists, by checkpoint name, every tensor that it wants: a `WeightSlot` knows the shape it
expects and where the values go. The loader feeds each slot exactly once and names whatever is
missing, left over or doubled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.weights.blocks import Blocks


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One expected checkpoint tensor."""

    shape: tuple[int, ...]
    load: Callable[[torch.Tensor], None]  # copies (and casts) into the parameter, or a part of it
    # Takes 4- or 8-bit blocks as they are; None where they must be dequantised first.
    load_blocks: Callable[[Blocks], None] | None = None
    on_host: bool = False  # the parameter is, though the model may be on a GPU
