"""What has changed since the last plan, gathered until the next one takes it along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.sched.plan import RowAdmission
from octavo.types import Finish, Started


@dataclass(slots=True)
class PlanDelta:
    """Rows freed and admitted, and block-table entries written."""

    freed_rows: list[int] = field(default_factory=list)
    admitted: list[RowAdmission] = field(default_factory=list)
    block_rows: list[int] = field(default_factory=list)
    block_cols: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)

    def add_blocks(self, row: int, first_col: int, block_ids: Sequence[int]) -> None:
        self.block_rows.extend([row] * len(block_ids))
        self.block_cols.extend(range(first_col, first_col + len(block_ids)))
        self.block_ids.extend(block_ids)


@dataclass(slots=True)
class StatsDelta:
    """Counts and events that the next `StepOutputs` report."""

    num_batched_tokens: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    started: list[Started] = field(default_factory=list)
    expired: list[Finish] = field(default_factory=list)
