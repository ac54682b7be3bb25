"""All layers of a decoder for a single token, in one launch.

Bytes: the layers' weights and the context's keys and values, each once. Layer by layer, seven
launches each read their share, and between any two of them the GPU's memory has little to do: for a
third of a token's time with a model of 0.6 billion parameters, a tenth with 8.

The twin is the layers one by one (`models.decoder`), which also do what the kernel does not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from octavo.kernels import launch

ROWS = 8  # of a weight in a tile, one for each warp
# With eight query heads to a KV head, and two of the latter, the separate kernels' matrix units and
# finer parts win: 51 against 91 us a layer at 16,000 tokens of context.
MAX_GROUP = 5  # query heads per KV head
MIN_KV_HEADS = 8
MAX_WIDTH = 24 << 10  # of a product's input, which lies in shared memory in float32
MAX_SPLITS = 16  # of a context
SHARED_BYTES = 200 << 10  # for a product's input and tiles of weights
UNIT = 128  # elements in which distances between tensors are counted


class LayerTensors(NamedTuple):
    """What the kernel reads of a layer, each by its place here, and the cache it writes. All
    are of one dtype, 16 bits wide.
    """

    qkv: torch.Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    out: torch.Tensor  # [hidden_size, num_heads * head_dim]
    gate_up: torch.Tensor  # [2 * intermediate_size, hidden_size]
    down: torch.Tensor  # [hidden_size, intermediate_size]
    input_norm: torch.Tensor  # [hidden_size]
    post_norm: torch.Tensor  # [hidden_size]
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None  # [head_dim]
    qkv_bias: torch.Tensor | None
    keys: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    values: torch.Tensor  # as keys


COLUMNS = len(LayerTensors._fields)


def takes(layers: Sequence[LayerTensors]) -> bool:
    """Whether there is a kernel for such layers on their device: one of Hopper, where it was
    measured.
    """
    first = layers[0]
    dtype, device = first.qkv.dtype, first.qkv.device
    if not launch.has_warpgroups(device) or any(_shapes(x) != _shapes(first) for x in layers):
        return False
    num_kv_heads, head_dim = first.keys.shape[2:]
    num_heads = len(first.qkv) // head_dim - 2 * num_kv_heads
    return (
        dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and num_heads // num_kv_heads <= MAX_GROUP
        and MIN_KV_HEADS <= num_kv_heads <= launch.num_processors(device)
        and _block_columns(first) is not None
        and all(_is_within_reach(first.qkv, t) for layer in layers for t in layer if t is not None)
        and _load() is not None
    )


def _load() -> ModuleType | None:
    return launch.load_gluon("decode_layers_hopper", "lone requests decode")


def _shapes(layer: LayerTensors) -> list[tuple[int, ...] | None]:
    return [None if tensor is None else tuple(tensor.shape) for tensor in layer]


class DecodeLayers:
    """The kernel for layers and a cache that `takes` has found right, with the room it works in."""

    def __init__(
        self, layers: Sequence[LayerTensors], *, activation: str, eps: float, scale: float
    ) -> None:
        from triton import next_power_of_2

        from octavo.kernels.activation_triton import KINDS
        from octavo.kernels.decode_attention_hopper import TILE

        first = layers[0]
        self._weight = first.qkv
        device = first.qkv.device
        distances = [
            [0 if tensor is None else _distance(first.qkv, tensor) for tensor in layer]
            for layer in layers
        ]
        self._table = torch.tensor(distances, dtype=torch.int32, device=device)
        hidden_size, inner = first.down.shape
        _, block_size, num_kv_heads, head_dim = first.keys.shape
        qkv_size, heads_size = first.qkv.shape[0], first.out.shape[1]
        num_heads = heads_size // head_dim
        group = num_heads // num_kv_heads
        self._num_programs = launch.num_processors(device)
        most_splits = self._num_programs // num_kv_heads
        max_splits = min(next_power_of_2(most_splits + 1) // 2, MAX_SPLITS)
        between = torch.empty(hidden_size + qkv_size + inner, dtype=first.qkv.dtype, device=device)
        parts, weights = (
            torch.empty(max_splits * size, dtype=torch.float32, device=device)
            for size in (heads_size, num_heads)
        )
        self._room = between, parts, weights, torch.zeros(2, dtype=torch.int32, device=device)
        self._numbers = (
            len(layers),
            first.keys.stride(0),
            first.keys.stride(1),
            scale * 1.4426950408889634,
            eps,
        )
        block_k = _block_columns(first)
        assert block_k is not None
        widest = max(hidden_size, heads_size, inner, group * TILE.value)  # the last: attention
        tile = ROWS * block_k
        # Beyond a third of a layer, more weights ahead of their use only delay all other reading.
        layer_tiles = sum(w.numel() for w in first[:4]) // (tile * self._num_programs)
        stages = min((SHARED_BYTES - 4 * widest) // (2 * tile), max(layer_tiles // 3, 4))
        self._constants = {
            "HIDDEN": hidden_size,
            "INNER": inner,
            "GROUP": group,
            "KV_HEADS": num_kv_heads,
            "DIM": head_dim,
            "MAX_SPLITS": max_splits,
            "BLOCK_SIZE": block_size,
            "HAS_BIAS": first.qkv_bias is not None,
            "HAS_HEAD_NORMS": first.query_norm is not None,
            "ACTIVATION": KINDS[activation],
            "BLOCK_K": block_k,
            "VECTOR": widest,
            "STAGES": stages,
            "PADDED": max(next_power_of_2(num_heads), block_k // head_dim),
            "TASK_HEADS": next_power_of_2(group + 1),
        }

    def run(
        self,
        x: torch.Tensor,  # [1, hidden_size], overwritten with the result
        block_tables: torch.Tensor,  # [1, max_blocks] int32
        seq_lens: torch.Tensor,  # [1] int32, this token included
        slot_mapping: torch.Tensor,  # [1] int64
        rope_table: torch.Tensor,  # [max_model_len, head_dim] float32
    ) -> torch.Tensor:
        """The hidden state after all layers; the token's keys and values are in the cache."""
        kernels = _load()
        assert kernels is not None
        kernels.decode_layers_kernel[(self._num_programs,)](
            x,
            self._weight,
            self._table,
            block_tables,
            seq_lens,
            slot_mapping,
            rope_table,
            *self._room,
            *self._numbers,
            **self._constants,
            num_warps=ROWS,
            launch_cooperative_grid=True,  # programs wait for each other, so all have to run
        )
        return x


def _block_columns(layer: LayerTensors) -> int | None:
    """How wide a tile of weights is; None: no width fits."""
    widths = [weight.shape[1] for weight in (layer.qkv, layer.out, layer.down)]
    if max(widths) > MAX_WIDTH:
        return None
    fitting = (n for n in (1024, 512, 256) if all(width % n == 0 for width in widths))
    return next(fitting, None)


def _is_within_reach(first: torch.Tensor, tensor: torch.Tensor) -> bool:
    return (
        tensor.dtype == first.dtype
        and tensor.is_contiguous()
        and (tensor.data_ptr() - first.data_ptr()) % (UNIT * first.itemsize) == 0
        and abs(_distance(first, tensor)) < 1 << 31
    )


def _distance(first: torch.Tensor, tensor: torch.Tensor) -> int:
    """In UNITs."""
    return (tensor.data_ptr() - first.data_ptr()) // (UNIT * first.itemsize)
