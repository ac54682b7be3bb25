"""All layers of a model in one native call.

At one token a layer is some 200 microseconds of work, and nine calls from Python cost half as much
again. So once the weights are loaded, layers of the plain pre-norm shape are replaced by one module
that hands the whole stack to the native kernels: the same kernels in the same order, so the result
is the same to the last bit. Except for prompts on AMX: they are multiplied in bfloat16 here,
because a stack knows which rows are of a prompt, and a layer does not (docs/decisions/0012).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import nn

from octavo.attention.context import ForwardContext
from octavo.attention.cpu_backend import NativeAttention
from octavo.kernels.cpu import ops
from octavo.kernels.cpu.library import Layer, Matrix, load
from octavo.kernels.rope import Rope
from octavo.layers.attention import SelfAttention
from octavo.layers.linear import Linear, MergedLinear
from octavo.layers.mlp import GatedMLP
from octavo.models.decoder import DecoderLayer, DecoderLM
from octavo.quant.int8 import Int8Method


def stack_layers(model: nn.Module) -> bool:
    """Replace the layers of a loaded, quantised model by a `NativeStack`, if every one of them is a
    `DecoderLayer` and nothing else; says whether it did.
    """
    if not isinstance(model, DecoderLM) or not all(_is_plain(layer) for layer in model.layers):
        return False
    model.layers = nn.ModuleList([NativeStack([*model.layers])])
    return True


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not DecoderLayer:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is not SelfAttention or type(mlp) is not GatedMLP:
        return False
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    return all(isinstance(linear.method, Int8Method) for linear in linears)


class NativeStack(nn.Module):
    """Stands in for a model's layers, with the signature of one."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        super().__init__()
        library = load()
        assert library is not None
        self._library = library
        # Its own modules no longer, but what the pointers lead to; also the way to run without.
        self._modules_run_one_by_one = tuple(layers)
        self._layers = (Layer * len(layers))(*(_native(layer) for layer in layers))
        self._floats_per_token = library.octavo_layer_floats(ctypes.byref(self._layers[0]))
        self._work = torch.empty(0)
        self._caches: tuple[object, ...] = ()

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, rope: Rope, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DecoderLayer.forward`, through all layers; x is overwritten."""
        backend, spec = context.backend, self._modules_run_one_by_one[0].self_attn.attention.spec
        if not isinstance(backend, NativeAttention) or not backend.takes(spec, context.kv[0]):
            for layer in self._modules_run_one_by_one:
                x, residual = layer(x, residual, rope, context)
            assert residual is not None
            return x, residual
        assert residual is None
        x = x.contiguous()
        residual = torch.empty_like(x)
        num_floats = self._floats_per_token * len(x)
        if len(self._work) < num_floats:
            self._work = torch.empty(num_floats)
        k, v = self._cache_pointers(context)
        last = context.batch_of(len(self._layers) - 1)
        self._library.octavo_layers(
            self._layers,
            len(self._layers),
            x.data_ptr(),
            residual.data_ptr(),
            k,
            v,
            ops.NUMBERS[context.kv[0].k.dtype],
            backend.native_batch(context.batch, context.kv[0]).pointer,
            backend.native_batch(last, context.kv[0]).pointer,
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
            rope.cos.shape[-1],
            self._work.data_ptr(),
        )
        num_queries = len(x) if last.queries is None else len(last.queries)
        return x[:num_queries], residual[:num_queries]

    def _cache_pointers(self, context: ForwardContext) -> tuple[object, object]:
        """Arrays of pointers to each layer's keys and values."""
        if not self._caches or self._caches[0] is not context.kv:
            array = ctypes.c_void_p * len(self._layers)
            keys = array(*(layer.k.data_ptr() for layer in context.kv))
            values = array(*(layer.v.data_ptr() for layer in context.kv))
            self._caches = (context.kv, keys, values)
        return self._caches[1], self._caches[2]


def _native(layer: DecoderLayer) -> Layer:
    attention, mlp, spec = layer.self_attn, layer.mlp, layer.self_attn.attention.spec
    linears: tuple[Linear | MergedLinear, ...] = (  # type: ignore[assignment]  # what a decoder layer has
        attention.qkv_proj,
        attention.o_proj,
        mlp.gate_up_proj,
        mlp.down_proj,
    )
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    norms = attention.head_norms()
    return Layer(
        *(_matrix(linear) for linear in linears),
        *(_pointer(linear.bias) for linear in linears),
        *(_pointer(weight) for weight in (before.weight, after.weight)),
        *((None, None) if norms is None else (_pointer(norms.query), _pointer(norms.key))),
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        spec.sliding_window or 0,
        spec.scale,
        spec.logit_softcap or 0.0,
        before.eps,
        0.0 if norms is None else norms.eps,
        before.add_one,
        ops.ACTIVATIONS[mlp.activation],
    )


def _matrix(linear: Linear | MergedLinear) -> Matrix:
    matrix: ops.PackedMatrix = linear.matrix  # type: ignore[assignment]
    return matrix.native


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
