"""`Sampler`: from logits to tokens, batched, with every request's own parameters.

The order is vLLM's: forbidden tokens and biases, penalties, temperature, min_p, top_k, top_p, draw.
Log-probabilities are reported of the raw logits, before all that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import sampling
from octavo.kernels.argmax import argmax
from octavo.kernels.cpu import ops as cpu
from octavo.runner.penalties import RowConstraints, TokenCounts, make_constraints
from octavo.runner.rows import to_device, to_host
from octavo.sched.plan import RowAdmission
from octavo.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """Raw log-probabilities of some rows, on the device or on their way to the host."""

    rows: tuple[int, ...]
    num_top: tuple[int, ...]  # per row, how many of the most likely tokens it wants
    token_ids: torch.Tensor  # [n, 1 + most] int64: the chosen token, then the most likely
    logprobs: torch.Tensor  # [n, 1 + most] float32
    ranks: torch.Tensor  # [n] int64

    def on_its_way(self) -> SampledLogprobs:
        """A copy that is on the host when the device has come so far."""
        tensors = to_host(self.token_ids), to_host(self.logprobs), to_host(self.ranks)
        return SampledLogprobs(self.rows, self.num_top, *tensors)

    def to_host(self) -> dict[int, TokenLogprobs]:
        """By row. Waits for the device, if it still has them."""
        return dict(zip(self.rows, self.to_host_list(), strict=True))

    def to_host_list(self) -> list[TokenLogprobs]:
        """In order; as `to_host`."""
        entries = zip(
            self.num_top,
            self.token_ids.tolist(),
            self.logprobs.tolist(),
            self.ranks.tolist(),
            strict=True,
        )
        return [
            TokenLogprobs(tuple(ids[: top + 1]), tuple(values[: top + 1]), rank)
            for top, ids, values, rank in entries
        ]


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, rows: list[int], num_top: list[int]
) -> SampledLogprobs:
    """Log-probabilities of `token_ids` and of the most likely tokens.

    Args:
        logits: [n, vocab] float32, raw.
        token_ids: [n] int64.
        rows, num_top: of length n.
    """
    return SampledLogprobs(
        tuple(rows), tuple(num_top), *sampling.rate(logits, token_ids, max(num_top))
    )


class Sampler:
    """Owns the sampling state of every row."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        # On the host: which path a row takes.
        self._temperature = np.zeros(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int64)
        self._top_p = np.ones(num_rows, np.float32)
        self._min_p = np.zeros(num_rows, np.float32)
        self._seeds = np.zeros(num_rows, np.int64)
        self._num_logprobs = np.full(num_rows, -1, np.int64)
        self._constraints: dict[int, RowConstraints] = {}
        self._penalty_values: dict[int, tuple[float, float, float]] = {}

    def admit(self, admission: RowAdmission) -> None:
        row, request = admission.row, admission.request
        params = request.params
        self._temperature[row] = params.temperature
        self._top_k[row] = 0 if params.top_k >= self._vocab_size else params.top_k
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seeds[row] = request.seed
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.free(row)
        constraints = make_constraints(
            request, admission.output_token_ids, self._vocab_size, self._device
        )
        if constraints is not None:
            self._constraints[row] = constraints
        if params.uses_penalties:
            self._penalty_values[row] = (
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )

    def free(self, row: int) -> None:
        self._constraints.pop(row, None)
        self._penalty_values.pop(row, None)

    def is_plain_greedy(self, rows: npt.NDArray[np.int32]) -> bool:
        """Whether the rows' tokens are simply the most likely ones, with nothing to report."""
        if (self._temperature[rows] != 0.0).any() or (self._num_logprobs[rows] >= 0).any():
            return False
        return not self._constraints or not any(row in self._constraints for row in rows.tolist())

    def sample(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> tuple[torch.Tensor, SampledLogprobs | None]:
        """One token per row.

        Args:
            logits: [n, vocab] float32; overwritten.
            rows: [n].
            positions: [n], where each sampled token will stand in its sequence.

        Returns:
            tokens [n] int64 on the device, and the log-probabilities that some rows ask for.
        """
        wanted = np.flatnonzero(self._num_logprobs[rows] >= 0)
        if not len(wanted):
            return self._choose(logits, rows, positions), None
        index, picked = self._index(wanted), rows[wanted]
        raw = logits[index] if self._constraints else None
        token_ids = self._choose(logits, rows, positions)
        if raw is None:
            raw = logits if len(wanted) == len(rows) else logits[index]
        return token_ids, gather_logprobs(
            raw, token_ids[index], picked.tolist(), self._num_logprobs[picked].tolist()
        )

    def _choose(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> torch.Tensor:
        self._restrict(logits, rows, positions)
        if (self._temperature[rows] == 0.0).all():
            token_ids = argmax(logits)
        else:
            token_ids = self._draw(logits, rows, positions)
        for i, row in enumerate(rows.tolist() if self._constraints else ()):
            if row in self._constraints:
                self._constraints[row].observe(token_ids[i : i + 1])
        return token_ids

    def _restrict(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> None:
        if not self._constraints:
            return
        penalised: dict[int, TokenCounts] = {}
        for i, row in enumerate(rows.tolist()):
            if (constraints := self._constraints.get(row)) is not None:
                constraints.restrict(logits[i], int(positions[i]))
                if constraints.counts is not None:
                    penalised[i] = constraints.counts
        if penalised:
            self._penalise(logits, rows, penalised)

    def _penalise(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        penalised: dict[int, TokenCounts],  # by index into rows
    ) -> None:
        values = [self._penalty_values[int(rows[i])] for i in penalised]
        if cpu.suits(logits):  # looks at the tokens that were seen, a row at a time
            for (i, counts), row_values in zip(penalised.items(), values, strict=True):
                cpu.penalise(logits[i], counts.seen, counts.output, row_values)
            return
        index = self._index(list(penalised))
        logits[index] = sampling.penalise_torch(
            logits[index],
            torch.stack([counts.seen for counts in penalised.values()]),
            torch.stack([counts.output for counts in penalised.values()]),
            self._tensor(np.array(values, np.float32)),
        )

    def _draw(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> torch.Tensor:
        """Rows of every kind at once."""
        whole = self._tensor(np.stack([self._top_k[rows], self._seeds[rows], positions]))
        parts = self._tensor(
            np.stack([self._temperature[rows], self._top_p[rows], self._min_p[rows]])
        )
        (top_k, seeds, places), (temperature, top_p, min_p) = whole, parts
        return sampling.sample(logits, temperature, top_k, top_p, min_p, seeds, places)

    def rehearse(self) -> None:
        """Draw once from nothing, for the kernels to be compiled."""
        logits = torch.zeros((1, self._vocab_size), device=self._device)
        self._draw(logits, np.zeros(1, np.int32), np.zeros(1, np.int32))

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(np.ascontiguousarray(array), self._device)

    def _index(self, positions: npt.NDArray[np.int64] | list[int]) -> torch.Tensor:
        return to_device(np.asarray(positions, np.int64), self._device)
