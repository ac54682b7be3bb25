"""The native CPU kernels as functions on tensors.

All work on float32 tensors in main memory; `takes` says whether a tensor is one of those that they
are there for. Those that choose tokens (sample, rate, penalise) are there for any that `suits`. A
row's result never depends on the rows around it, bit for bit, nor on the number of threads.

On AMX, rows of prompts are multiplied in another way than those that were generated: which of them
a row is must not depend on its batch either. Only whole stacks of layers (`quant.stack`) know.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref

import torch

from octavo.kernels.cpu.library import Matrix, Penalties, load

_LIBRARY = load()
ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_pytorch_tanh": 2,
    "gelu_new": 2,
}
# Block formats by number, as csrc/native.h has them; bytes of a block of 32 values.
KINDS = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2}
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
GROUP = 32
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_scope = threading.local()


@contextmanager
def in_charge(is_on: bool = True) -> Iterator[None]:
    """Within it, and in this thread, the dispatch functions of `kernels` (norm, rope, activation,
    argmax) choose native code: for a model whose matrices run here too. Elsewhere float32 on a CPU
    is computed by torch, to the bit as in the reference implementations.
    """
    before = getattr(_scope, "is_on", False)
    _scope.is_on = is_on
    try:
        yield
    finally:
        _scope.is_on = before


def takes(x: torch.Tensor) -> bool:
    """Whether native code should work on this tensor, here and now."""
    return getattr(_scope, "is_on", False) and suits(x)


def suits(x: torch.Tensor) -> bool:
    """Whether native code can work on this tensor."""
    return (
        _LIBRARY is not None
        and x.device.type == "cpu"
        and x.dtype is torch.float32
        and x.stride(-1) == 1
    )


class PackedMatrix:
    """A [out_features, in_features] matrix in 4 or 8 bits, in the order that the kernels read.

    The order depends on the CPU's instruction set. Made empty: `fill` every row.

    With `packed`, the bytes of another such matrix, it is made of these, which are only read from
    then on: they may be a mapped file. Raises ValueError if they are not as many as it needs.
    """

    def __init__(
        self, kind: str, out_features: int, in_features: int, packed: torch.Tensor | None = None
    ) -> None:
        assert _LIBRARY is not None
        num_bytes = _LIBRARY.octavo_packed_bytes(KINDS[kind], in_features, out_features)
        if packed is None:
            packed = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
            # The last panel may have rows that are nobody's.
            packed[-_LIBRARY.octavo_packed_bytes(KINDS[kind], in_features, 1) :] = 0
        elif packed.nbytes != num_bytes or not packed.is_contiguous():
            shape = (out_features, in_features)
            raise ValueError(f"{kind} {shape} takes {num_bytes} bytes, not {packed.nbytes}")
        self.kind = kind
        self.shape = (out_features, in_features)
        self.packed = packed
        self.native = Matrix(
            self.packed.data_ptr(),
            KINDS[kind],
            in_features,
            out_features,
            -(-in_features // GROUP),
        )
        self._pointer = byref(self.native)
        self._library = _LIBRARY

    def fill(self, blocks: torch.Tensor, row: int = 0) -> None:
        """Put GGUF blocks, [num_rows, bytes of a row] uint8, in the place of rows from `row` on."""
        row_bytes = -(-self.shape[1] // GROUP) * BLOCK_BYTES[self.kind]
        if blocks.shape[1] != row_bytes or row + len(blocks) > self.shape[0]:
            raise ValueError(f"blocks {tuple(blocks.shape)} do not fit {self.kind} {self.shape}")
        blocks = blocks.contiguous()
        self._library.octavo_pack(self._pointer, blocks.data_ptr(), row, len(blocks))

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, is_prompt: bool = False
    ) -> torch.Tensor:
        """x @ self.T + bias, with x rounded to 8 bits per row and group of 32.

        x: [..., in_features] float32; the result [..., out_features]. With `is_prompt`, where the
        instruction set is "amx", x and self are rounded to bfloat16 instead.
        """
        out_features, in_features = self.shape
        if x.stride(-1) != 1 or x.ndim != 2:
            x = x.reshape(-1, in_features).contiguous() if x.ndim != 2 else x.contiguous()
        num_rows = x.shape[0]
        out = torch.empty((num_rows, out_features))
        self._library.octavo_linear(
            self._pointer,
            x.data_ptr(),
            num_rows,
            x.stride(0),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            is_prompt,
        )
        return out

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows as float32, [len(ids), in_features]. IndexError for an id that is out of range."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise IndexError(f"an id is not within [0, {self.shape[0]})")
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty((len(ids), self.shape[1]))
        self._library.octavo_lookup(self._pointer, ids.data_ptr(), len(ids), out.data_ptr())
        return out


def to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """A matrix in GGUF's Q8_0 blocks, [rows, bytes of a row] uint8; the last block of a row is
    padded with zeros.
    """
    assert _LIBRARY is not None
    num_rows, size = x.shape
    x = x.contiguous() if x.dtype in NUMBERS else x.to(torch.float32).contiguous()
    blocks = torch.empty((num_rows, -(-size // GROUP) * BLOCK_BYTES["Q8_0"]), dtype=torch.uint8)
    _LIBRARY.octavo_to_q8_0(x.data_ptr(), NUMBERS[x.dtype], num_rows, size, blocks.data_ptr())
    return blocks


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, add_one: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm`; the residual is overwritten by the sum."""
    assert _LIBRARY is not None
    size = x.shape[-1]
    if x.ndim != 2 or residual is not None:  # rows of one stride; the residual's are dense
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
    out = torch.empty(x.shape)
    _LIBRARY.octavo_rms_norm(
        x.data_ptr(),
        x.stride(0) if x.ndim == 2 else size,
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // size,
        size,
        eps,
        add_one,
    )
    return out, x if residual is None else residual


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `kernels.rope`; works in place."""
    assert _LIBRARY is not None
    token_stride, head_stride, _ = x.stride()
    _LIBRARY.octavo_rotate(
        x.data_ptr(),
        x.shape[0],
        token_stride,
        x.shape[1],
        head_stride,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
    )
    return x


def gated_activation(gate_up: torch.Tensor, name: str) -> torch.Tensor:
    """See `kernels.activation`."""
    assert _LIBRARY is not None
    if gate_up.ndim != 2:
        gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size))
    _LIBRARY.octavo_gate(
        gate_up.data_ptr(),
        gate_up.stride(0) if gate_up.ndim == 2 else 2 * size,
        out.data_ptr(),
        gate_up.numel() // (2 * size),
        size,
        ACTIVATIONS[name],
    )
    return out


def argmax(x: torch.Tensor) -> torch.Tensor:
    """The first index of each row's largest value, [n] int64."""
    assert _LIBRARY is not None
    x = x.contiguous()
    out = torch.empty(len(x), dtype=torch.int64)
    _LIBRARY.octavo_argmax(x.data_ptr(), len(x), x.shape[1], out.data_ptr())
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """See `kernels.sampling`. One call for all rows; the parameters are [n]."""
    assert _LIBRARY is not None
    logits = logits.contiguous()
    parts = [x.to(torch.float32).contiguous() for x in (temperature, top_p, min_p)]
    whole = [x.to(torch.int64).contiguous() for x in (top_k, seeds, positions)]
    if any(x.shape != logits.shape[:1] for x in (*parts, *whole)):
        raise ValueError("each row of logits needs one parameter of each kind")
    out = torch.empty(len(logits), dtype=torch.int64)
    pointers = (x.data_ptr() for x in (*parts, *whole, out))
    _LIBRARY.octavo_sample(logits.data_ptr(), *logits.shape, *pointers)
    return out


def rate(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.sampling`. IndexError for an id that is out of range."""
    assert _LIBRARY is not None
    num_rows, size = logits.shape
    if num_top > size:
        raise ValueError(f"there are no {num_top} tokens but {size}")
    if num_rows and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < size:
        raise IndexError(f"an id is not within [0, {size})")
    logits = logits.contiguous()
    ids = torch.empty((num_rows, 1 + num_top), dtype=torch.int64)
    ids[:, 0] = token_ids
    logprobs, ranks = torch.empty(ids.shape), torch.empty(num_rows, dtype=torch.int64)
    pointers = (x.data_ptr() for x in (ids, logprobs, ranks))
    _LIBRARY.octavo_rate(logits.data_ptr(), num_rows, size, num_top, *pointers)
    return ids, logprobs, ranks


def penalise(
    logits: torch.Tensor,  # [vocab]; in place
    seen: torch.Tensor,  # [vocab] bool
    counts: torch.Tensor,  # [vocab] int32
    values: tuple[float, float, float],
) -> None:
    """One row of `kernels.sampling.penalise_torch`, bit for bit."""
    assert _LIBRARY is not None
    if not seen.shape == counts.shape == logits.shape:
        raise ValueError("each logit needs one count and one mark")
    _LIBRARY.octavo_penalise(
        logits.data_ptr(),
        len(logits),
        seen.data_ptr(),
        counts.data_ptr(),
        byref(Penalties(*values)),
    )
