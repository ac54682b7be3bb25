"""`Request`: one request's life, from arrival to its single terminal message."""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

from octavo.kvcache import BlockTable, extend_chain
from octavo.types import EngineRequest


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """The one mutable state machine per request; only its methods change it.

        WAITING --start--> RUNNING --finish--> FINISHED
           ^                  |
           +---- preempt -----+         (finish is possible from WAITING too)

    While a request runs, its tokens and counters live in its row of the `RowTable`; `preempt` takes
    them back.
    """

    __slots__ = (
        "arrival_index",
        "chain",
        "first_scheduled_s",
        "num_preemptions",
        "num_prompt_logprobs",
        "row",
        "spec",
        "status",
        "table",
        "token_ids",
    )

    def __init__(self, spec: EngineRequest, arrival_index: int) -> None:
        self.spec = spec
        self.arrival_index = arrival_index
        self.status = Status.WAITING
        self.row = -1
        self.table: BlockTable | None = None
        self.token_ids: npt.NDArray[np.int32] = np.array(
            spec.prompt_token_ids + spec.output_token_ids, dtype=np.int32
        )
        self.chain: list[bytes] = []
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0  # reported so far
        self.first_scheduled_s: float | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.spec.prompt_token_ids)

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """What was generated before the last preemption, or by another engine."""
        return tuple(self.token_ids[self.prompt_len :].tolist())

    def hash_blocks(self, token_ids: npt.NDArray[np.int32], block_size: int) -> None:
        """Bring the hash chain up to `token_ids`, the request's tokens known so far."""
        extend_chain(self.chain, token_ids, block_size, self.spec.cache_salt)

    def start(self, row: int, table: BlockTable, now_s: float) -> None:
        assert self.status is Status.WAITING
        self.status, self.row, self.table = Status.RUNNING, row, table
        if self.first_scheduled_s is None:
            self.first_scheduled_s = now_s

    def preempt(self, token_ids: npt.NDArray[np.int32]) -> None:
        """Back to waiting, with the tokens known so far; their KV will be computed again."""
        assert self.status is Status.RUNNING
        self.status, self.row, self.table = Status.WAITING, -1, None
        self.token_ids = token_ids
        self.num_preemptions += 1

    def finish(self) -> None:
        assert self.status is not Status.FINISHED, "a second terminal message"
        self.status, self.row, self.table = Status.FINISHED, -1, None
