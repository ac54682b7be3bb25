"""The flight recorder: the last few thousand steps of an engine, as the engine writes them and
`octavo replay` reads them. `tape` has the files.

A plan is written before it runs, so the last one is the one that killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import octavo
from octavo.config import EngineArgs
from octavo.engine.core import Pending, Runner
from octavo.engine.recording_check import BadRecordingError, RecordingCheck, int32_array
from octavo.engine.tape import End, frame_of, frames_of, preamble
from octavo.errors import ConfigError, OctavoError
from octavo.log import get_logger
from octavo.sched.plan import RowAdmission, RowSnapshot, StepPlan, StepResult
from octavo.types import EngineInfo

logger = get_logger(__name__)

STEPS_PER_FILE = 2000
_BYTES_PER_FILE = 32 << 20
_INT_ARRAYS = ("rows", "starts", "chunk_lens", "token_ids", "block_rows", "block_cols", "block_ids")


class Start(msgspec.Struct, tag="start"):
    """First: what the engine was."""

    version: str
    args: EngineArgs
    info: EngineInfo


class Rows(msgspec.Struct, tag="rows"):
    """Second: the rows that were occupied then."""

    rows: list[RowSnapshot]


class Planned(msgspec.Struct, tag="plan"):
    """A step that is about to run. Arrays are little-endian int32, `samples` bytes of 0 or 1."""

    step: int
    at_s: float  # time.monotonic() of the engine's host
    num_decodes: int
    samples: bytes
    arrays: dict[str, bytes]
    freed_rows: tuple[int, ...]
    admitted: tuple[RowAdmission, ...]

    @classmethod
    def of(cls, plan: StepPlan) -> Planned:
        return cls(
            plan.step,
            time.monotonic(),
            plan.num_decodes,
            plan.samples.astype(np.uint8).tobytes(),
            {name: getattr(plan, name).astype("<i4").tobytes() for name in _INT_ARRAYS},
            plan.freed_rows,
            plan.admitted,
        )

    def to_plan(self) -> StepPlan:
        """Raises BadRecordingError."""
        if self.arrays.keys() != set(_INT_ARRAYS):
            raise BadRecordingError("it has other arrays than a plan")
        arrays: dict[str, Any] = {
            name: int32_array(name, data) for name, data in self.arrays.items()
        }
        return StepPlan(
            step=self.step,
            num_decodes=self.num_decodes,
            samples=np.frombuffer(self.samples, np.uint8).astype(np.bool_),
            freed_rows=self.freed_rows,
            admitted=self.admitted,
            **arrays,
        )


class Ran(msgspec.Struct, tag="result"):
    """A step has run."""

    step: int
    at_s: float
    token_ids: bytes  # little-endian int32, one per sampled row

    def tokens(self) -> list[int]:
        """Raises BadRecordingError."""
        return list(int32_array("token_ids", self.token_ids).tolist())


Record = Start | Rows | Planned | Ran | End
_decoder = msgspec.msgpack.Decoder(Record)
# msgspec says of bad UTF-8 and of deep nesting what Python says.
_UNREADABLE = (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OctavoError)


class Recorder:
    """The engine's end. Writes are to memory and cost microseconds."""

    def __init__(self, fds: Sequence[int], args: EngineArgs) -> None:
        """`fds` are two files open for writing."""
        self._fds = list(fds)
        self._args = args
        self._serial = 0
        self._is_broken = False
        self._num_steps = self._num_bytes = 0

    @property
    def is_full(self) -> bool:
        """Is it time for `begin`?"""
        return self._num_steps >= STEPS_PER_FILE or self._num_bytes >= _BYTES_PER_FILE

    def begin(
        self, info: EngineInfo, rows: list[RowSnapshot], in_flight: Iterable[StepPlan]
    ) -> None:
        """Go on in the other file, from `rows` and the plans that are in flight."""
        self._fds.reverse()
        self._num_steps = 0
        self._is_broken = False
        self._serial += 1
        with contextlib.suppress(OSError):
            os.ftruncate(self._fds[0], 0)
            os.lseek(self._fds[0], 0, os.SEEK_SET)
            os.write(self._fds[0], preamble(self._serial))
        self._write(Start(octavo.__version__, self._args, info))
        self._write(Rows(rows))
        self._num_bytes = 0  # what a file must begin with does not fill it
        for plan in in_flight:
            self.planned(plan)

    def planned(self, plan: StepPlan) -> None:
        self._num_steps += 1
        self._write(Planned.of(plan))

    def ran(self, plan: StepPlan, result: StepResult) -> None:
        token_ids = result.token_ids.astype("<i4").tobytes()
        self._write(Ran(plan.step, time.monotonic(), token_ids))

    def _write(self, record: Record) -> None:
        """A full memory costs the recording its end, not the engine its life."""
        if self._is_broken:
            return
        frame = frame_of(record)
        self._num_bytes += len(frame)
        try:
            self._is_broken = os.write(self._fds[0], frame) < len(frame)
        except OSError as error:
            self._is_broken = True
            logger.warning("steps are not recorded for now: %s", error)


@dataclass(frozen=True, slots=True)
class _RecordedStep:
    recorder: Recorder
    plan: StepPlan
    pending: Pending

    def wait(self) -> StepResult:
        result = self.pending.wait()
        self.recorder.ran(self.plan, result)
        return result


class RecordedRunner:
    """A runner whose steps are written down: the plan before it runs, the tokens after."""

    def __init__(self, runner: Runner, recorder: Recorder) -> None:
        self._runner = runner
        self._recorder = recorder
        self.num_blocks = runner.num_blocks
        self.report = runner.report
        self.prepare_more = runner.prepare_more
        self.close = runner.close

    def submit(self, plan: StepPlan) -> Pending:
        self._recorder.planned(plan)
        return _RecordedStep(self._recorder, plan, self._runner.submit(plan))


@dataclass(frozen=True, slots=True)
class Step:
    plan: StepPlan
    at_s: float
    token_ids: list[int] | None  # None: it was in flight when the engine died


@dataclass(frozen=True, slots=True)
class Recording:
    """A dump, read."""

    start: Start
    rows: list[RowSnapshot]
    steps: list[Step]
    end: End

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Raises ConfigError for a file that is none, or that no engine can have written."""
        try:
            records = [_decoder.decode(frame) for frame in frames_of(path.read_bytes())]
        except _UNREADABLE as error:
            raise ConfigError(f"{path} cannot be read as a flight recording: {error}") from None
        if not records or not isinstance(records[0], Start) or not isinstance(records[-1], End):
            raise ConfigError(f"{path} is not a whole flight recording.")
        # The second file begins with rows and plans in flight that follow from the first one.
        snapshots = [record.rows for record in records if isinstance(record, Rows)]
        if not snapshots:
            raise ConfigError(f"{path} is not a whole flight recording.")
        plans = {record.step: record for record in records if isinstance(record, Planned)}
        results = {record.step: record for record in records if isinstance(record, Ran)}
        try:
            check = RecordingCheck(records[0].info, snapshots[0])
            steps = [_step(p, results.get(p.step), check) for p in plans.values()]
        except BadRecordingError as error:
            raise ConfigError(f"{path} is no flight recording of an engine: {error}.") from None
        return cls(records[0], snapshots[0], steps, records[-1])


def _step(planned: Planned, ran: Ran | None, check: RecordingCheck) -> Step:
    plan = planned.to_plan()
    check.plan(plan)
    token_ids = None if ran is None else ran.tokens()
    if token_ids is not None:
        check.tokens(plan, token_ids)
    return Step(plan, planned.at_s, token_ids)
