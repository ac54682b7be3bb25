"""`DeviceRows`: what the device remembers of each running request between steps."""

from __future__ import annotations

import numpy as np
import torch

from octavo.sched.plan import StepPlan


class DeviceRows:
    """Permanent rows, written only when a plan says so. Block 0 and row contents of free rows are
    padding.
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self._device = device
        self.block_tables = torch.zeros((num_rows, max_blocks), dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def update(self, plan: StepPlan) -> None:
        """Take over the plan's new block-table entries."""
        if len(plan.block_ids):
            where = np.stack([plan.block_rows, plan.block_cols]).astype(np.int64)
            rows, cols = torch.from_numpy(where).to(self._device, non_blocking=True)
            block_ids = torch.from_numpy(plan.block_ids).to(self._device, non_blocking=True)
            self.block_tables.index_put_((rows, cols), block_ids)
