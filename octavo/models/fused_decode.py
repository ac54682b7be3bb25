"""A decoder's layers as one kernel, for steps of a single token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from octavo.attention.base import KVLayer
from octavo.attention.context import ForwardContext
from octavo.kernels.decode_layers import DecodeLayers, LayerTensors, takes
from octavo.kernels.rope import Rope

if TYPE_CHECKING:
    from octavo.models.decoder import DecoderLayer


class FusedDecode:
    """Finds out at the first step of one token whether there is a kernel for these layers, and
    again when the cache is another one: weights stay where they are, and no graph outlives the
    cache it was captured with.
    """

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self._layers = layers
        self._cache: list[int] = []  # where the kernel reads it
        self._kernel: DecodeLayers | None = None

    def run(
        self, x: torch.Tensor, ropes: Sequence[Rope], context: ForwardContext
    ) -> torch.Tensor | None:
        """[1, hidden_size] -> the same after all layers, written over x; None: the layers are to do
        it, one by one.
        """
        batch = context.batch
        is_one = len(x) == 1 and len(batch.query_lens) == 1 and context.last_batch is None
        if not is_one or not context.backend.gives_up_decodes:
            return None
        cache = [tensor.data_ptr() for layer in context.kv for tensor in (layer.k, layer.v)]
        if cache != self._cache:
            self._cache, self._kernel = cache, self._find_kernel(context.kv, ropes)
        if self._kernel is None:
            return None
        return self._kernel.run(
            x, batch.block_tables, batch.seq_lens, batch.slot_mapping, ropes[0].table
        )

    def _find_kernel(self, kv: Sequence[KVLayer], ropes: Sequence[Rope]) -> DecodeLayers | None:
        first = self._layers[0]
        layers: list[LayerTensors] = []
        for layer, cache in zip(self._layers, kv, strict=True):
            tensors = layer.plain_tensors(cache)
            if tensors is None:
                return None
            layers.append(tensors)
        spec = first.self_attn.attention.spec
        if any(rope is not ropes[0] for rope in ropes) or ropes[0].table.shape[1] != spec.head_dim:
            return None
        constants = {
            (layer.mlp.activation, layer.input_layernorm.eps, layer.self_attn.attention.spec)
            for layer in self._layers
        }
        if len(constants) > 1 or not takes(layers):
            return None
        return DecodeLayers(
            layers,
            activation=first.mlp.activation,
            eps=first.input_layernorm.eps,
            scale=spec.scale,
        )
