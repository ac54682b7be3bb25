"""`Sampler`: from logits to tokens, batched, with every request's own parameters.

The order is vLLM's: forbidden tokens and biases, penalties, temperature, min_p, top_k, top_p, draw.
Log-probabilities are reported of the raw logits, before all that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import launch
from octavo.kernels.argmax import argmax
from octavo.runner.penalties import RowConstraints, make_constraints
from octavo.runner.random import uniforms
from octavo.runner.rows import to_device, to_host
from octavo.sched.plan import RowAdmission
from octavo.types import TokenLogprobs

# Rows with top_k or top_p look at this many most likely tokens first. Only if those do not hold
# top_p of the mass are all of them sorted.
_NUM_CANDIDATES = 256


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
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    top_values, top_ids = logprobs.topk(max(num_top), dim=-1)
    return SampledLogprobs(
        tuple(rows),
        tuple(num_top),
        torch.cat([token_ids[:, None], top_ids], dim=1),
        torch.cat([chosen, top_values], dim=1),
        (logprobs > chosen).sum(dim=-1) + 1,
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
        raw = logits[self._index(wanted)].clone() if len(wanted) else None
        self._restrict(logits, rows, positions)
        token_ids = self._draw(logits, rows, positions)
        for i, row in enumerate(rows.tolist() if self._constraints else ()):
            if row in self._constraints:
                self._constraints[row].observe(token_ids[i : i + 1])
        if raw is None:
            return token_ids, None
        picked = rows[wanted]
        return token_ids, gather_logprobs(
            raw,
            token_ids[self._index(wanted)],
            picked.tolist(),
            self._num_logprobs[picked].tolist(),
        )

    def _restrict(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> None:
        if not self._constraints:
            return
        penalised = []
        for i, row in enumerate(rows.tolist()):
            if (constraints := self._constraints.get(row)) is not None:
                constraints.restrict(logits[i], int(positions[i]))
                if constraints.counts is not None:
                    penalised.append((i, row))
        if penalised:
            index = self._index([i for i, _ in penalised])
            logits[index] = self._penalise(logits[index], [row for _, row in penalised])

    def _penalise(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Repetition penalty over prompt and output, frequency and presence over the output
        only.
        """
        counts = [self._constraints[row].counts for row in rows]
        output = torch.stack([c.output for c in counts if c is not None])
        seen = torch.stack([c.seen for c in counts if c is not None])
        values = self._tensor(np.array([self._penalty_values[row] for row in rows], np.float32))
        repetition, frequency, presence = values[:, :, None].unbind(1)
        factor = torch.where(seen, repetition, 1.0)
        logits = torch.where(logits > 0, logits / factor, logits * factor)
        return logits - frequency * output - presence * (output > 0)

    def _draw(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> torch.Tensor:
        """Greedy rows, free rows and rows with top_k or top_p each go their own way."""
        greedy = self._temperature[rows] == 0.0
        if greedy.all():
            return argmax(logits)
        if launch.takes(logits):
            return self._draw_at_once(logits, rows, positions)
        narrow = ~greedy & ((self._top_k[rows] > 0) | (self._top_p[rows] < 1.0))
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for mask, draw in (
            (greedy, None),
            (narrow, self._draw_narrow),
            (~greedy & ~narrow, self._draw_free),
        ):
            if not mask.any():
                continue
            index, some = self._index(np.flatnonzero(mask)), rows[mask]
            part = logits if mask.all() else logits[index]
            if draw is None:
                token_ids[index] = part.argmax(dim=-1)
                continue
            numbers = uniforms(self._tensor(self._seeds[some]), self._tensor(positions[mask]))
            scaled = part / self._tensor(self._temperature[some])[:, None]
            token_ids[index] = draw(scaled, some, numbers)
        return token_ids

    def rehearse(self) -> None:
        """Draw once from nothing, for the kernels to be compiled."""
        logits = torch.zeros((1, self._vocab_size), device=self._device)
        self._draw_at_once(logits, np.zeros(1, np.int32), np.zeros(1, np.int32))

    def _draw_at_once(
        self,
        logits: torch.Tensor,
        rows: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
    ) -> torch.Tensor:
        """On a GPU: every kind of row in one launch, without sorting or waiting."""
        from octavo.kernels import sampling_triton

        whole = self._tensor(np.stack([self._top_k[rows], self._seeds[rows], positions]))
        parts = self._tensor(
            np.stack([self._temperature[rows], self._top_p[rows], self._min_p[rows]])
        )
        (top_k, seeds, places), (temperature, top_p, min_p) = whole, parts
        return sampling_triton.sample(logits, temperature, top_k, top_p, min_p, seeds, places)

    def _draw_free(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], numbers: torch.Tensor
    ) -> torch.Tensor:
        return _invert_cdf(self._min_p_filter(torch.softmax(logits, dim=-1), rows), numbers)

    def _draw_narrow(
        self, logits: torch.Tensor, rows: npt.NDArray[np.int32], numbers: torch.Tensor
    ) -> torch.Tensor:
        top_k, top_p = self._top_k[rows], self._top_p[rows]
        limits = np.where(top_k > 0, top_k, self._vocab_size)
        probs = self._min_p_filter(torch.softmax(logits, dim=-1), rows)
        num_candidates = min(max(_NUM_CANDIDATES, int(top_k.max())), self._vocab_size)
        values, token_ids = probs.topk(num_candidates, dim=-1)
        open_ended = top_k == 0  # bounded by top_p alone
        if open_ended.any() and num_candidates < self._vocab_size:
            needed = self._tensor(np.where(open_ended, top_p, 0.0).astype(np.float32))
            if bool((values.sum(dim=-1) < needed * probs.sum(dim=-1)).any()):
                values, token_ids = probs.sort(dim=-1, descending=True)
        ranks = torch.arange(values.shape[1], device=self._device)
        values = values.masked_fill(ranks >= self._tensor(limits)[:, None], 0.0)
        # The mass that top_p is a share of: what top_k left, or everything.
        mass = torch.where(self._tensor(open_ended), probs.sum(dim=-1), values.sum(dim=-1))[:, None]
        before = values.cumsum(dim=-1) - values
        keep = before < self._tensor(top_p)[:, None] * mass
        keep[:, 0] = True
        picks = _invert_cdf(values * keep, numbers)
        return token_ids.gather(1, picks[:, None])[:, 0]

    def _min_p_filter(self, probs: torch.Tensor, rows: npt.NDArray[np.int32]) -> torch.Tensor:
        min_p = self._min_p[rows]
        if not min_p.any():
            return probs
        floor = self._tensor(min_p)[:, None] * probs.amax(dim=-1, keepdim=True)
        return probs.masked_fill(probs < floor, 0.0)

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(np.ascontiguousarray(array), self._device)

    def _index(self, positions: npt.NDArray[np.int64] | list[int]) -> torch.Tensor:
        return to_device(np.asarray(positions, np.int64), self._device)


def _invert_cdf(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of each row's weights passes its number's share of the
    total.

    Args:
        weights: [n, m] float32, not negative, at least one positive per row.
        numbers: [n] float32 in [0, 1).
    """
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    picks = torch.searchsorted(cdf, numbers[:, None] * total, right=True)
    # Rounding may put a number at the very top; the last positive weight is where the total is
    # reached.
    last = torch.searchsorted(cdf, total)
    return torch.minimum(picks, last)[:, 0]
