"""The seam between the two towers: what to run (`StepPlan`) and what came out (`StepResult`).

Both are frozen values of numpy arrays, so that a step can be logged, replayed and simulated. A plan
carries changes, not the batch: rows admitted and freed, block-table entries added, and the chunk of
each row that runs.

Every running request owns one *row* for as long as it runs. The runner keeps per-row state on the
device (last sampled token, block table, sampling parameters, penalties), written only when a plan
says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.types import EngineRequest, TokenLogprobs

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RowAdmission:
    """A request takes a row.

    `output_token_ids` is empty on first admission; after a preemption it holds what was generated
    before, so that penalties and random state continue as if nothing had happened.
    """

    row: int
    request: EngineRequest
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RowSnapshot:
    """What a row holds at some moment: enough to go on from there."""

    row: int
    request: EngineRequest
    output_token_ids: tuple[int, ...]  # as far as the host knows them
    num_computed: int  # positions whose KV is in the cache
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Apply in this order: freed_rows, admitted, block updates, then run the chunks.

    Row `rows[i]` computes positions `[starts[i], starts[i] + chunk_lens[i])`. The first
    `num_decodes` rows have chunk length 1 and take their input token from the device (the row's
    last sampled token); the other rows' input tokens are in `token_ids`, concatenated in row order.
    Where `samples[i]`, the chunk's last position yields a token.
    """

    step: int
    rows: Int32Array  # [n]
    starts: Int32Array  # [n]
    chunk_lens: Int32Array  # [n]
    samples: BoolArray  # [n]
    num_decodes: int
    token_ids: Int32Array  # [sum(chunk_lens[num_decodes:])]
    freed_rows: tuple[int, ...] = ()
    admitted: tuple[RowAdmission, ...] = ()
    # Block table of row block_rows[j], entry block_cols[j], becomes block_ids[j].
    block_rows: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    block_cols: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    block_ids: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))

    @classmethod
    def of_changes(cls, **changes: Any) -> StepPlan:
        """A plan that runs nothing: rows and block tables change."""
        empty = np.empty(0, np.int32)
        return cls(
            step=-1,
            rows=empty,
            starts=empty,
            chunk_lens=empty,
            samples=np.empty(0, np.bool_),
            num_decodes=0,
            token_ids=empty,
            **changes,
        )

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a plan. `token_ids[j]` belongs to the j-th row with `samples` set, in plan
    order.
    """

    token_ids: Int32Array  # [samples.sum()]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by row, where asked for
    # By row: one entry per prompt position that this chunk predicts, i.e. for prompt tokens
    # start+1 .. start+chunk_len, as far as they belong to the prompt.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)

    @property
    def has_logprobs(self) -> bool:
        return bool(self.logprobs or self.prompt_logprobs)
