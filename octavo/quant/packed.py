"""A quantised model's tensors, out of it and into it again."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from octavo.errors import WeightsError
from octavo.kernels.cpu.library import packing
from octavo.layers.linear import MatrixLayer
from octavo.layers.parameter import slot_of
from octavo.quant.int8 import Int8Method
from octavo.weights.packed import IN_FULL, Packed


class QuantizedModel:
    """A `PackedModel`: packed matrices by the path of their layer, parameters by their own."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._matrices = {
            name: (layer, layer.method)
            for name, layer in model.named_modules()
            if isinstance(layer, MatrixLayer) and isinstance(layer.method, Int8Method)
        }

    @property
    def packing(self) -> str:
        return f"int8 {packing()}"

    def packed(self) -> dict[str, Packed]:
        tensors = {name: method.packed(layer) for name, (layer, method) in self._matrices.items()}
        for name, parameter in self._parameters.items():
            data = parameter.detach().view(-1).view(torch.uint8)
            tensors[name] = Packed(IN_FULL, tuple(parameter.shape), data)
        return tensors

    @torch.no_grad()
    def load_packed(self, tensors: Mapping[str, Packed]) -> None:
        if tensors.keys() != self._matrices.keys() | self._parameters.keys():
            raise WeightsError("Its tensors are not those of the model.")
        for name, (layer, method) in self._matrices.items():
            method.load_packed(layer, tensors[name])
        for name, parameter in self._parameters.items():
            slot_of(parameter).load(_in_full(tensors[name]))


def _in_full(tensor: Packed) -> torch.Tensor:
    if tensor.kind != IN_FULL or tensor.data.nbytes != 4 * math.prod(tensor.shape):
        raise WeightsError(f"{tensor.kind} {tensor.shape} is no tensor in {IN_FULL}.")
    return tensor.data.view(torch.float32).view(tensor.shape)
