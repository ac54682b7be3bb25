"""Log-probabilities of prompt tokens, for the rows that ask for them, in pieces that bound the
memory used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.runner.sampler import SampledLogprobs, gather_logprobs
from octavo.sched.plan import RowAdmission, StepPlan
from octavo.types import TokenLogprobs

_PIECE = 64  # positions whose logits exist at once: 64 x 152k x 4 bytes = 39 MB


@dataclass(frozen=True, slots=True)
class _Wanted:
    token_ids: torch.Tensor  # [prompt_len] int64, on the device
    num_top: int


class PromptLogprobs:
    """Knows which rows want them, and computes those of one step's chunks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wanted: dict[int, _Wanted] = {}

    def admit(self, admission: RowAdmission) -> None:
        self.free(admission.row)
        num_top = admission.request.params.prompt_logprobs
        if num_top is not None:
            token_ids = torch.tensor(admission.request.prompt_token_ids, dtype=torch.int64)
            self._wanted[admission.row] = _Wanted(token_ids.to(self._device), num_top)

    def free(self, row: int) -> None:
        self._wanted.pop(row, None)

    def wants_any(self, rows: npt.NDArray[np.int32]) -> bool:
        """Whether one of the rows asks for them."""
        return bool(self._wanted) and not self._wanted.keys().isdisjoint(rows.tolist())

    def compute(
        self,
        plan: StepPlan,
        hidden: torch.Tensor,  # [num_tokens, hidden_size]
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[int, list[SampledLogprobs]]:
        """By row: for chunk positions [start, end), those of prompt tokens [start + 1, end + 1)."""
        if not self._wanted:
            return {}
        results: dict[int, list[SampledLogprobs]] = {}
        offset = 0
        chunks = zip(
            plan.rows.tolist(), plan.starts.tolist(), plan.chunk_lens.tolist(), strict=True
        )
        for row, start, length in chunks:
            if (wanted := self._wanted.get(row)) is not None:
                targets = wanted.token_ids[start + 1 : start + length + 1]
                results[row] = [
                    gather_logprobs(
                        compute_logits(hidden[offset + i : offset + i + len(piece)]),
                        piece,
                        [row] * len(piece),
                        [wanted.num_top] * len(piece),
                    )
                    for i, piece in _pieces(targets)
                ]
            offset += length
        return results


def _pieces(targets: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(i, targets[i : i + _PIECE]) for i in range(0, len(targets), _PIECE)]


def to_host(results: dict[int, list[SampledLogprobs]]) -> dict[int, list[TokenLogprobs]]:
    """Waits for the device."""
    return {
        row: [entry for piece in pieces for entry in piece.to_host_list()]
        for row, pieces in results.items()
    }
