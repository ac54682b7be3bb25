"""`PrefixFinder`: which rows of a decode step begin with the same blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.sched.plan import StepPlan

# Worth a pass of its own: so many rows, and so many positions that are read once instead of by row.
MIN_MEMBERS = 8
_MIN_SAVED = 16_384


@dataclass(frozen=True, slots=True)
class CommonPrefix:
    """What some rows have in common."""

    row: int  # one of them
    length: int  # positions, whole blocks
    members: npt.NDArray[np.bool_]  # of the step's rows


class PrefixFinder:
    """Keeps a copy of the block tables on the host. Two rows hold the same block only where one
    took it from the prefix index, so what they have in common is written and never changes.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_rows, max_blocks), np.int32)
        self._num_blocks = np.zeros(num_rows, np.int64)
        self._rows = np.empty(0, np.int32)  # of the last answer
        self._found: CommonPrefix | None = None

    def update(self, plan: StepPlan) -> None:
        """Take over the plan's block-table entries."""
        for admission in plan.admitted:
            self._num_blocks[admission.row] = 0
            self._rows = self._rows[:0]
        if len(plan.block_ids):
            self._tables[plan.block_rows, plan.block_cols] = plan.block_ids
            np.maximum.at(self._num_blocks, plan.block_rows, plan.block_cols + 1)

    def find(self, rows: npt.NDArray[np.int32]) -> CommonPrefix | None:
        """The prefix that saves the most, if it is worth the while. All rows must be past it: they
        decode.
        """
        if not np.array_equal(rows, self._rows):
            self._rows, self._found = rows.copy(), self._search(rows)
        return self._found

    def _search(self, rows: npt.NDArray[np.int32]) -> CommonPrefix | None:
        if len(rows) < MIN_MEMBERS:
            return None
        first = self._tables[rows, 0]
        ids, counts = np.unique(first, return_counts=True)
        if counts.max() < MIN_MEMBERS:
            return None
        leader = int(rows[np.argmax(first == ids[np.argmax(counts)])])
        # The last block may still be written to: it is never shared.
        limits = self._num_blocks[rows] - 1
        width = int(limits.max())
        same = self._tables[rows, :width] == self._tables[leader, :width]
        same &= np.arange(width) < limits[:, None]
        lengths = np.where(same.all(axis=1), width, np.argmin(same, axis=1)) if width else limits
        ordered = np.sort(lengths)[::-1]
        saved = ordered * np.arange(len(ordered)) * self._block_size
        best = int(np.argmax(saved))
        if best + 1 < MIN_MEMBERS or saved[best] < _MIN_SAVED:
            return None
        num_blocks = int(ordered[best])
        return CommonPrefix(leader, num_blocks * self._block_size, lengths >= num_blocks)
