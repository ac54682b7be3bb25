"""A batch's chunks in compressed rows: which pages of the cache each has, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

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
    query_lens = np.array(batch.query_lens[first:], np.int32)
    seq_lens = np.array(batch.host_seq_lens[first:], np.int32)
    num_pages = -(-seq_lens // block_size)
    query_starts, page_starts = _starts(query_lens), _starts(num_pages)
    last_page_lens = seq_lens - (num_pages - 1) * block_size
    # Page j of all is entry j - page_starts[i] in row i of the tables.
    offsets = np.arange(first, len(tables)) * tables.shape[1] - page_starts[:-1]
    places = np.arange(page_starts[-1]) + np.repeat(offsets, num_pages)
    host = (query_starts, page_starts, last_page_lens, seq_lens)
    packed = _fetchable(np.concatenate(host), tables.device)
    queries, pages, last_lens, lens = torch.split(packed, [*map(len, host)])
    entries = _fetchable(places, tables.device).to(tables.device, non_blocking=True)
    first_row = sum(batch.query_lens[:first])
    rows = slice(first_row, first_row + int(query_starts[-1]))
    return Pages(rows, queries, pages, last_lens, lens, tables.take(entries))


def _starts(lens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], lens.cumsum()]).astype(np.int32)


def _fetchable(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """On the host, where the device can fetch it in its own time."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory()
