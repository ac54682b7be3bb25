"""Chunks by FlashInfer, an optional package for NVIDIA GPUs; decodes stay with Triton.

FlashInfer shares a step's work out among processors on the host, before the step (`plan`). A CUDA
graph cannot hold that, and needs it to be done again whenever a length changes. So it gets what the
host knows the lengths of, and steps with chunks are not captured; steps of decodes alone run ahead
of the host as they do without it.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from typing import Any

import torch

from octavo.attention.base import AttentionBatch, AttentionSpec, KVLayer
from octavo.attention.pages import Pages, find_pages
from octavo.attention.triton_backend import TritonAttention
from octavo.errors import ConfigError
from octavo.log import get_logger

logger = get_logger(__name__)

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
# What FlashInfer recommends, for sums over parts of contexts. Its kernels for Hopper keep none, the
# others float32 sums of 2 x 128 rows per processor at most: 35 MB for heads of 256 on 132.
_WORKSPACE_BYTES = 128 << 20
_INSTEAD = "or choose another backend: --attention-backend triton."


class FlashInferAttention(TritonAttention):
    """Heads of 64, 128 or 256 numbers in 16 bits, sliding window, softcap, grouped queries.

    It remembers the plans of the last batch with chunks; a batch's tensors must not change once it
    was used.
    """

    name = "flashinfer"
    captures_decodes = True
    captures_chunks = False
    compiles_ahead = gives_up_decodes = True  # Triton's, for the decodes

    def __init__(self) -> None:
        super().__init__()
        self._wrapper_type = _import_wrapper()
        self._planners: dict[AttentionSpec, _Planner] = {}
        self._sums: torch.Tensor | None = None
        self._batch: AttentionBatch | None = None
        self._pages: Pages | None = None
        self._planned: dict[AttentionSpec, Any] = {}

    def check(self, specs: Sequence[AttentionSpec], dtype: torch.dtype) -> None:
        """See `PreparedAttention.check`."""
        for spec in specs:
            _check(spec, dtype)

    def prepare(
        self, specs: Sequence[AttentionSpec], dtype: torch.dtype, device: torch.device
    ) -> None:
        """See `PreparedAttention.prepare`. Compiles kernels that are not in FlashInfer's cache."""
        start_s = time.perf_counter()
        logger.info("loading FlashInfer's kernels; compiling them, once, takes minutes")
        for spec in dict.fromkeys(specs):
            self._load(spec, dtype, device)
        logger.info("FlashInfer's kernels are there after %.1f s", time.perf_counter() - start_s)

    def _load(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> None:
        """Plan for a single token, for which the kernels must be there."""
        one, two = torch.ones(1, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
        pages = Pages(slice(1), two, two, one, one, torch.zeros_like(one, device=device))
        try:
            self._planner(spec, device).plan(pages, 16, dtype)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (OSError, RuntimeError) as error:
            raise ConfigError(_explain(error)) from error

    def _can_pack(self, qkv: torch.Tensor, spec: AttentionSpec) -> bool:
        return False

    def _attend_chunks(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        qkv: torch.Tensor | None,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> None:
        if batch is not self._batch:
            self._batch, self._pages = batch, find_pages(batch, kv.k.shape[1])
            self._planned.clear()
        assert self._pages is not None
        planned = self._planned.get(spec)
        if planned is None:
            planner = self._planner(spec, query.device)
            planned = planner.plan(self._pages, kv.k.shape[1], query.dtype)
            self._planned[spec] = planned
        rows = self._pages.rows
        planned.run(query[rows], (kv.k, kv.v), out=out[rows])

    def _planner(self, spec: AttentionSpec, device: torch.device) -> _Planner:
        if self._sums is None:
            self._sums = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        if spec not in self._planners:
            self._planners[spec] = _Planner(spec, self._wrapper_type, self._sums)
        return self._planners[spec]


class _Turn:
    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]  # the last plan is copied


class _Planner:
    """Plans for layers that attend alike.

    A wrapper sends its plan from pinned memory of its own, whenever the device comes to it. So two
    take turns, and none is planned anew before its last plan has left: the host is at most two
    plans ahead, and has rarely to wait.
    """

    def __init__(self, spec: AttentionSpec, wrapper_type: Any, sums: torch.Tensor) -> None:
        self._spec = spec
        self._device = sums.device
        self._turns = itertools.cycle([_Turn(wrapper_type(sums, "NHD")) for _ in range(2)])

    def plan(self, pages: Pages, block_size: int, dtype: torch.dtype) -> Any:
        """A wrapper whose `run` attends to these pages, valid until the next plan but one."""
        spec, turn = self._spec, next(self._turns)
        turn.sent.synchronize()
        turn.wrapper.plan(
            pages.query_starts,
            pages.page_starts,
            pages.page_ids,
            pages.last_page_lens,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            block_size,
            causal=True,
            sm_scale=spec.scale,
            # FlashInfer counts the keys before the query's own.
            window_left=-1 if spec.sliding_window is None else spec.sliding_window - 1,
            logits_soft_cap=spec.logit_softcap,
            q_data_type=dtype,
            kv_data_type=dtype,
            seq_lens=pages.seq_lens,
        )
        turn.sent.record(torch.cuda.current_stream(self._device))
        return turn.wrapper


def _check(spec: AttentionSpec, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ConfigError(
            f"FlashInfer attends in 16 bits, not in {str(dtype).removeprefix('torch.')}. "
            f"Use --dtype bfloat16 or float16, {_INSTEAD}"
        )
    if spec.head_dim not in HEAD_DIMS:
        raise ConfigError(
            f"FlashInfer has no kernels for heads of {spec.head_dim} numbers, as this model's are, "
            f"only of {', '.join(map(str, HEAD_DIMS))}. Choose another backend: "
            "--attention-backend triton."
        )


def _import_wrapper() -> Any:
    try:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"FlashInfer cannot be imported: {error}. Install it with pip install "
            f"'octavo[flashinfer]', {_INSTEAD}"
        ) from error
    return BatchPrefillWithPagedKVCacheWrapper


def _explain(error: Exception) -> str:
    """A compiler's output can be thousands of lines, of which a few say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    telling = [line for line in lines if re.search(r"error:|not found|No such file", line)]
    told = " | ".join((telling or lines)[:3])
    return (
        f"FlashInfer could not load or build its attention kernels: {told}. "
        "It compiles them on first use, with nvcc (CUDA_HOME says where), CUDA's headers, those of "
        f"curand too, and ninja. Install what is missing, {_INSTEAD}"
    )
