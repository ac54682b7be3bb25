"""`DeviceRows`: what the device remembers of each running request between steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from octavo.sched.plan import StepPlan


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy on the device, without waiting: a GPU reads it from pinned memory in its own time."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, without waiting: it is there when the device has come so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class DeviceRows:
    """Permanent rows, written only when a plan says so. One more row than requests may hold, the
    `scratch` row, is for padding: its block table is all zeros, and block 0 belongs to nobody.
    """

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        self.device = device
        self.scratch = num_rows
        shape = (num_rows + 1, max_blocks)
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        # On the host: how many of a row's tokens its request came with.
        self.prompt_lens = np.zeros(num_rows + 1, np.int32)
        # Positions whose KV is in the cache: where a row's next token goes.
        self.num_computed = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)

    def update(self, plan: StepPlan) -> None:
        """Take over the plan's admissions and new block-table entries."""
        for admission in plan.admitted:
            self.prompt_lens[admission.row] = len(admission.request.prompt_token_ids)
        if len(plan.block_ids):
            packed = np.stack([plan.block_rows, plan.block_cols, plan.block_ids])
            rows, cols, block_ids = to_device(packed, self.device)
            self.block_tables.index_put_((rows, cols), block_ids)
