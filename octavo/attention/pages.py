"""A batch's chunks in compressed rows: which pages of the cache each has, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from octavo.attention.base import AttentionBatch


@dataclass(frozen=True, slots=True)
class Pages:
    """Chunks of a step and the blocks they attend to. All but `page_ids` is on the host."""

    rows: slice  # which tokens of the step
    query_starts: torch.Tensor  # [num_chunks + 1] int32, in `rows`
    page_starts: torch.Tensor  # [num_chunks + 1] int32, in `page_ids`
    last_page_lens: torch.Tensor  # [num_chunks] int32, positions used of the last page, 1 or more
    seq_lens: torch.Tensor  # [num_chunks] int32
    page_ids: torch.Tensor  # [num_pages] int32


def find_pages(batch: AttentionBatch, block_size: int) -> Pages:
    """The pages of all that is no decode; nothing waits for the device."""
    first, tables = batch.num_decodes, batch.block_tables
    device, width = tables.device, tables.shape[1]
    query_lens = torch.tensor(batch.query_lens[first:], dtype=torch.int32)
    seq_lens = torch.tensor(batch.host_seq_lens[first:], dtype=torch.int32)
    num_pages = (seq_lens + block_size - 1) // block_size
    page_starts, query_starts = _starts(num_pages), _starts(query_lens)
    last_page_lens = seq_lens - (num_pages - 1) * block_size
    seqs = torch.repeat_interleave(torch.arange(len(seq_lens)), num_pages)
    cols = torch.arange(len(seqs)) - page_starts[seqs]
    places = _pinned((first + seqs) * width + cols, device).to(device, non_blocking=True)
    host = (query_starts, page_starts, last_page_lens, seq_lens)
    packed = _pinned(torch.cat(host), device)
    query_starts, page_starts, last_page_lens, seq_lens = torch.split(packed, [*map(len, host)])
    first_row = sum(batch.query_lens[:first])
    rows = slice(first_row, first_row + int(query_starts[-1]))
    return Pages(rows, query_starts, page_starts, last_page_lens, seq_lens, tables.take(places))


def _starts(lens: torch.Tensor) -> torch.Tensor:
    return F.pad(lens.cumsum(0), (1, 0)).to(torch.int32)


def _pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """So that the device can fetch it in its own time."""
    return host if device.type == "cpu" else host.pin_memory()
