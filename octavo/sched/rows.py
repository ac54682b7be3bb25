"""`RowTable`: the counters and tokens of running requests, one device row each, as numpy columns.

Columns rather than objects, so that a steady decode step costs a handful of array operations
however many requests run. By position, a row's sequence looks like this:

    [0, num_computed)            KV is in the cache, or will be by the steps in flight
    [num_computed, num_total)    to be computed; counts tokens that steps in flight will sample
    [0, num_known)               tokens whose values the host has seen
    [0, num_admitted)            tokens known when the request took the row: these reach the device
                                 in plans, all later ones are sampled there
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octavo.sched.request import Request

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

_NUM_STOP_COLUMNS = 8
_NO_TOKEN = -1


class RowTable:
    """Written by the scheduler only."""

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.requests: list[Request | None] = [None] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))  # lowest row first
        self.tokens: Int32Array = np.empty((num_rows, max_model_len), np.int32)  # touched lazily
        self.num_known: Int32Array = np.zeros(num_rows, np.int32)
        self.num_total: Int32Array = np.zeros(num_rows, np.int32)
        self.num_computed: Int32Array = np.zeros(num_rows, np.int32)
        self.num_admitted: Int32Array = np.zeros(num_rows, np.int32)
        self.max_total: Int32Array = np.zeros(num_rows, np.int32)
        self.num_blocks: Int32Array = np.zeros(num_rows, np.int32)
        self.request_ids = np.zeros(num_rows, np.int64)
        # Grows with each tenancy: tells results of a former tenant, still in flight, from the
        # present one's.
        self.serials = np.zeros(num_rows, np.int64)
        self._stops: Int32Array = np.full((num_rows, _NUM_STOP_COLUMNS), _NO_TOKEN, np.int32)
        self._many_stops: dict[int, frozenset[int]] = {}  # rows with more stop tokens than columns

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self.requests) - len(self._free)

    def next_free(self) -> int:
        return self._free[-1]

    def running(self) -> list[Request]:
        """In row order."""
        return [request for request in self.requests if request is not None]

    def occupy(self, request: Request, num_computed: int) -> None:
        """Give `request`, which has just been started on the next free row, its columns."""
        row = self._free.pop()
        assert row == request.row, "not the next free row"
        assert request.table is not None
        spec, num_tokens = request.spec, len(request.token_ids)
        self.requests[row] = request
        self.tokens[row, :num_tokens] = request.token_ids
        self.num_known[row] = self.num_total[row] = self.num_admitted[row] = num_tokens
        self.num_computed[row] = num_computed
        self.max_total[row] = spec.max_total_len
        self.num_blocks[row] = len(request.table.block_ids)
        self.request_ids[row] = spec.request_id
        self._stops[row] = _NO_TOKEN
        if len(spec.stop_token_ids) <= _NUM_STOP_COLUMNS:
            self._stops[row, : len(spec.stop_token_ids)] = spec.stop_token_ids
        else:
            self._many_stops[row] = frozenset(spec.stop_token_ids)

    def vacate(self, row: int) -> None:
        self.requests[row] = None
        self.serials[row] += 1
        self._many_stops.pop(row, None)
        self._free.append(row)

    def known_tokens(self, row: int) -> Int32Array:
        """A copy of the row's tokens, [num_known]."""
        return self.tokens[row, : self.num_known[row]].copy()

    def is_prefilling(self, row: int) -> bool:
        return bool(self.num_computed[row] < self.num_admitted[row])

    def append(self, rows: Int32Array, token_ids: Int32Array) -> None:
        """The host learns one token of each row."""
        self.tokens[rows, self.num_known[rows]] = token_ids
        self.num_known[rows] += 1

    def hits_stop(self, rows: Int32Array, token_ids: Int32Array) -> BoolArray:
        """Which of the rows' newest tokens end their request."""
        hits: BoolArray = (self._stops[rows] == token_ids[:, None]).any(axis=1)
        if self._many_stops:
            for i, (row, token_id) in enumerate(
                zip(rows.tolist(), token_ids.tolist(), strict=True)
            ):
                if row in self._many_stops:
                    hits[i] = token_id in self._many_stops[row]
        return hits
