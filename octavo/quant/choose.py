"""Give a model's matrices the method that the configuration names."""

from __future__ import annotations

from torch import nn

from octavo.config.sections import Quantization
from octavo.layers.embedding import TiedMethod
from octavo.layers.linear import MatrixLayer
from octavo.quant.int8 import Int8Method


def quantize(model: nn.Module, quantization: Quantization) -> None:
    """Change every matrix of a model whose weights are not loaded yet. "none" changes nothing."""
    if quantization == "none":
        return
    method = Int8Method()
    for layer in model.modules():
        if isinstance(layer, MatrixLayer) and not isinstance(layer.method, TiedMethod):
            layer.change_method(method)
