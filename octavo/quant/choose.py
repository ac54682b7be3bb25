"""Give a model's matrices the method that the configuration names."""

from __future__ import annotations

from torch import nn

from octavo.config.sections import Quantization
from octavo.layers.embedding import TiedMethod
from octavo.layers.linear import MatrixLayer
from octavo.layers.moe import MoE
from octavo.quant.int8 import Int8Method
from octavo.quant.packed import QuantizedModel
from octavo.weights.packed import PackedModel


def quantize(model: nn.Module, quantization: Quantization) -> PackedModel | None:
    """Change every matrix of a model whose weights are not loaded yet, and return the way to its
    packed weights. "none" changes nothing.

    Experts stay as they are, for they are no matrices but stacks of them, and so do their routers:
    they are small, and what they decide jumps.
    """
    if quantization == "none":
        return None
    method = Int8Method()
    routers = {layer.gate for layer in model.modules() if isinstance(layer, MoE)}
    for layer in model.modules():
        if not isinstance(layer, MatrixLayer) or layer in routers:
            continue
        if not isinstance(layer.method, TiedMethod):
            layer.change_method(method)
    return QuantizedModel(model)
