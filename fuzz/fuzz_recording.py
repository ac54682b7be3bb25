"""Flight recordings, as `octavo replay` reads them.

Checked beside what `oracle` says: the plans of a recording that is read can be run by a device that
looks at every index, since real ones write where a plan tells them.
"""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from support.flights import BUDGET, fly, request

from fuzz import oracle
from fuzz.mutators import mutate_bytes, mutate_tree
from octavo.cli.replay import _describe, _line
from octavo.engine import recording
from octavo.engine.recording import Recording
from octavo.engine.replay import Replay
from octavo.engine.tape import Tape, frame_of, frames_of
from octavo.sched.plan import StepPlan, StepResult
from octavo.types import EngineInfo

INSTRUMENTED = ("octavo.engine", "octavo.sched")
MAX_LEN = 256 << 10

_FOLDER = oracle.scratch_folder()
_PATH = _FOLDER / "fuzz.flight"


class CheckedDevice:
    """A runner that computes nothing and takes only what a real one could."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self.num_blocks = info.num_blocks
        self.report: Any = None

    def submit(self, plan: StepPlan) -> CheckedDevice:
        info = self._info
        for admission in plan.admitted:
            self._within([admission.row], info.max_num_seqs, "row")
            ids = admission.request.prompt_token_ids + admission.output_token_ids
            self._within(ids, info.vocab_size, "token")
            oracle.expect(len(ids) <= info.max_model_len, "a prompt beyond the context")
        blocks_per_row = -(-info.max_model_len // info.block_size)
        self._within([*plan.freed_rows, *plan.rows, *plan.block_rows], info.max_num_seqs, "row")
        self._within(plan.block_cols, blocks_per_row, "column")
        self._within(plan.block_ids, info.num_blocks + 1, "block")
        self._within(plan.token_ids, info.vocab_size, "token")
        self._within(plan.chunk_lens, info.max_num_batched_tokens + 1, "length")
        self._within(plan.starts + plan.chunk_lens, info.max_model_len + 1, "position")
        oracle.expect(plan.num_tokens <= info.max_num_batched_tokens, "too large a step")
        oracle.expect(len(set(plan.rows.tolist())) == len(plan.rows), "a row twice")
        oracle.expect(len(plan.samples) == len(plan.starts) == len(plan.rows), "ragged arrays")
        num_prompt = int(plan.chunk_lens[plan.num_decodes :].sum())
        oracle.expect(num_prompt == len(plan.token_ids), "tokens and lengths differ")
        self._num_sampled = int(plan.samples.sum())
        return self

    def wait(self) -> StepResult:
        return StepResult(np.zeros(self._num_sampled, np.int32))

    def set_last_tokens(self, rows: Any, token_ids: Any) -> None:
        oracle.expect(len(rows) == len(token_ids), "rows and tokens differ")
        self._within(rows, self._info.max_num_seqs, "row")
        self._within(token_ids, self._info.vocab_size, "token")

    @staticmethod
    def _within(values: Any, bound: int, what: str) -> None:
        oracle.expect(all(0 <= value < bound for value in values), f"a {what} out of bounds")

    def prepare_more(self) -> bool:
        return False

    def close(self) -> None:
        pass


def check(data: bytes) -> None:
    _PATH.write_bytes(data)
    with oracle.judged(len(data)):
        read = Recording.read(_PATH)
        with contextlib.redirect_stdout(io.StringIO()):
            _describe(read)
            for step in read.steps:
                _line(step.plan, known=step.token_ids is not None)
        info = read.start.info
        device: Any = CheckedDevice(info)
        Replay(read, device, info.max_num_batched_tokens).run(lambda plan, known: None)


def seeds() -> list[bytes]:
    """Dumps of short flights: with and without steps in flight, rows at the start, an abort."""
    made = []
    for depth, steps, per_file, abort in ((0, 6, 2000, -1), (1, 9, 4, -1), (2, 12, 5, 6)):
        tape = Tape()
        requests = [request(i + 1, 5 + 4 * i, 6) for i in range(3)]
        with mock.patch.object(recording, "STEPS_PER_FILE", per_file):
            fly(tape, requests, depth=depth, steps=steps, abort=abort)
        path = tape.dump(_FOLDER, "signal 9")
        tape.close()
        oracle.expect(path is not None, "no dump")
        made.append(Path(str(path)).read_bytes())
    return made


_ARRAYS = ("rows", "starts", "chunk_lens", "token_ids", "block_rows", "block_cols", "block_ids")
_WORDS = ("plan", "result", "rows", "start", "end", "samples", "arrays", *_ARRAYS, b"", b"\1" * 7)
_WORDS += (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 40, BUDGET)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change a record, or the order of them; now and then the bytes."""
    frames = [bytes(frame) for frame in frames_of(data)]
    if not frames or rng.random() < 0.05:
        return mutate_bytes(data, rng)
    index = rng.randrange(len(frames))
    match rng.randrange(8):
        case 0:
            del frames[index]
        case 1:
            frames.insert(rng.randrange(len(frames) + 1), frames[index])
        case _:
            with contextlib.suppress(
                msgspec.MsgspecError, ValueError, OverflowError, RecursionError
            ):
                tree = mutate_tree(msgspec.msgpack.decode(frames[index]), rng, _WORDS)
                frames[index] = msgspec.msgpack.encode(tree)
    return b"".join(frame_of(msgspec.Raw(frame)) for frame in frames)


def check_seeds() -> None:
    for data in seeds():
        _PATH.write_bytes(data)
        oracle.expect(bool(Recording.read(_PATH).steps), "a seed without steps")
