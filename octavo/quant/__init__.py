"""How matrices are stored and multiplied in fewer bits: `LinearMethod`s, and their choice."""

from __future__ import annotations

from octavo.quant.choose import quantize
from octavo.quant.stack import stack_layers

__all__ = ["quantize", "stack_layers"]
