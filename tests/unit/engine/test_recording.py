"""The flight recorder: what is written, what survives, and that it can be run again."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_runner import FakeRunner, expected_tokens

from octavo.config import EngineArgs, SchedulerConfig
from octavo.engine import recording
from octavo.engine.recording import RecordedRunner, Recorder, Recording
from octavo.engine.replay import Outcome, Replay
from octavo.engine.tape import Tape
from octavo.errors import ConfigError
from octavo.kvcache import KVCache
from octavo.sched.plan import StepPlan, StepResult
from octavo.sched.scheduler import Scheduler
from octavo.types import EngineInfo, EngineRequest, SamplingParams

BLOCK, BLOCKS, MAX_LEN, BUDGET = 4, 40, 64, 24
INFO = EngineInfo(
    model="m",
    architecture="X",
    dtype="float32",
    device="cpu",
    max_model_len=MAX_LEN,
    vocab_size=50,
    eos_token_ids=(),
    block_size=BLOCK,
    num_blocks=BLOCKS - 1,
    kv_capacity_tokens=BLOCK * (BLOCKS - 1),
    max_num_seqs=5,
    max_num_batched_tokens=BUDGET,
    enable_prefix_caching=True,
)


class Now:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Report:
    seconds: dict[str, float] = {}  # noqa: RUF012
    memory_bytes: dict[str, int] = {}  # noqa: RUF012


class Device:
    """The fake runner with a real one's face."""

    num_blocks = BLOCKS
    report = Report()

    def __init__(self) -> None:
        self.fake = FakeRunner(BLOCKS, BLOCK)

    def submit(self, plan: StepPlan) -> Now:
        return Now(self.fake.execute(plan))

    def set_last_tokens(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        for row, token_id in zip(rows, token_ids, strict=True):
            if row in self.fake.rows:
                self.fake.rows[row].last_token = token_id

    def prepare_more(self) -> bool:
        return False

    def close(self) -> None:
        pass


def request(
    request_id: int, prompt_len: int, max_tokens: int, own: int = 0, stops: tuple[int, ...] = ()
) -> EngineRequest:
    """Prompts of one `own` share their beginning."""
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple((i * 7 + own) % 50 for i in range(prompt_len)),
        stop_token_ids=stops,
        params=SamplingParams(),
        max_total_len=min(prompt_len + max_tokens, MAX_LEN),
        seed=request_id % 3,
    )


def fly(
    tape: Tape,
    requests: Sequence[EngineRequest],
    *,
    depth: int,
    steps: int,
    abort: int = -1,
    every: int = 2,
    burst: int = 1,
    threshold: int = 0,
) -> None:
    """An engine that dies after `steps` steps."""
    config = SchedulerConfig(
        max_num_seqs=5,
        max_num_batched_tokens=BUDGET,
        max_model_len=MAX_LEN,
        block_size=BLOCK,
        policy="fcfs",
        enable_prefix_caching=True,
        long_prefill_token_threshold=threshold,
        async_depth=depth,
    )
    scheduler = Scheduler(config, KVCache(BLOCKS, BLOCK, enable_prefix_caching=True))
    recorder = Recorder(tape.fds, EngineArgs())
    runner = RecordedRunner(Device(), recorder)
    recorder.begin(INFO, [], [])
    in_flight = []
    queue = list(requests)
    for step in range(steps):
        if step % every == 0:
            for _ in range(burst):
                if queue:
                    scheduler.add(queue.pop(0))
        if step == abort:
            scheduler.abort([1])
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append((plan, runner.submit(plan)))
        if in_flight and (plan is None or len(in_flight) > depth):
            oldest, pending = in_flight.pop(0)
            scheduler.apply(oldest, pending.wait())
        if recorder.is_full:
            plans = [plan for plan, _ in in_flight]
            recorder.begin(INFO, scheduler.snapshot(plans), plans)


def replay(path: Path) -> Outcome:
    return Replay(Recording.read(path), Device(), BUDGET).run(lambda plan, known: None)


@settings(max_examples=300)
@given(
    lengths=st.lists(
        st.tuples(
            st.integers(1, 40),
            st.integers(1, 24),
            st.integers(0, 2),
            st.sampled_from([(), (3,), tuple(range(0, 50, 4))]),
        ),
        min_size=1,
        max_size=14,
    ),
    every=st.integers(1, 4),
    burst=st.integers(1, 5),
    threshold=st.sampled_from([0, 0, 3]),
    depth=st.integers(0, 2),
    steps=st.integers(1, 60),
    per_file=st.integers(2, 30),
    abort=st.integers(0, 30),
)
def test_a_recording_runs_again_to_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[tuple[int, int, int, tuple[int, ...]]],
    every: int,
    burst: int,
    threshold: int,
    depth: int,
    steps: int,
    per_file: int,
    abort: int,
) -> None:
    tape = Tape()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "STEPS_PER_FILE", per_file)
        requests = [request(i + 1, *kind) for i, kind in enumerate(lengths)]
        fly(
            tape,
            requests,
            depth=depth,
            steps=steps,
            abort=abort,
            every=every,
            burst=burst,
            threshold=threshold,
        )
    path = tape.dump(tmp_path_factory.mktemp("d"), "signal 9")
    tape.close()
    if path is None:
        return
    outcome = replay(path)
    assert outcome.num_steps == len(Recording.read(path).steps)
    assert not outcome.differences


def test_it_holds_the_latest_steps_and_those_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "STEPS_PER_FILE", 20)
    tape = Tape()
    fly(tape, [request(i + 1, 30, 30) for i in range(12)], depth=1, steps=90)
    path = tape.dump(tmp_path, "the cause")
    tape.close()
    assert path is not None
    read = Recording.read(path)
    numbers = [step.plan.step for step in read.steps]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert 20 <= len(numbers) <= 42
    assert [step.token_ids is None for step in read.steps[-3:]] == [False, False, True]
    assert read.rows
    assert read.end.cause == "the cause"
    assert replay(path).num_tokens > 20


def test_it_tells_who_was_in_the_steps_that_did_not_end(tmp_path: Path) -> None:
    for depth, count in ((0, 0), (1, 1), (2, 2)):
        tape = Tape()
        fly(tape, [request(i + 1, 9, 40) for i in range(4)], depth=depth, steps=20)
        found = tape.in_flight()
        path = tape.dump(tmp_path, "x")
        tape.close()
        assert path is not None
        open_steps = [step for step in Recording.read(path).steps if step.token_ids is None]
        assert len(open_steps) == count
        assert len(found) == len({row for step in open_steps for row in step.plan.rows.tolist()})
        assert set(found) <= {1, 2, 3, 4}
        assert all(start < end for start, end in found.values())


def test_a_token_that_differs_is_told(tmp_path: Path) -> None:
    tape = Tape()
    fly(tape, [request(7, 10, 20)], depth=0, steps=12)
    path = tape.dump(tmp_path, "x")
    tape.close()
    assert path is not None
    read = Recording.read(path)
    read.steps[4].token_ids[0] ^= 1  # type: ignore[index]
    outcome = Replay(read, Device(), BUDGET).run(lambda plan, known: None)
    assert outcome.differences[0].step == read.steps[4].plan.step
    assert outcome.differences[0].request_id == 7


def test_dumps_are_private_and_few(tmp_path: Path) -> None:
    folder = tmp_path / "crashes"
    tape = Tape()
    fly(tape, [request(1, 5, 5)], depth=0, steps=4)
    paths = [tape.dump(folder, str(i)) for i in range(12)]
    tape.close()
    assert sorted(folder.iterdir()) == paths[2:]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(paths[-1].stat().st_mode) == 0o600  # type: ignore[union-attr]


def test_a_writer_that_died_in_a_write_costs_its_last_record(tmp_path: Path) -> None:
    tape = Tape()
    fly(tape, [request(1, 5, 20)], depth=0, steps=8)
    newest = max(tape.fds, key=lambda fd: os.fstat(fd).st_size)
    os.ftruncate(newest, os.fstat(newest).st_size - 3)
    path = tape.dump(tmp_path, "x")
    tape.close()
    assert path is not None
    assert [step.token_ids is None for step in Recording.read(path).steps[-2:]] == [False, True]


def test_an_engine_that_never_stepped_leaves_no_dump(tmp_path: Path) -> None:
    tape = Tape()
    assert tape.dump(tmp_path, "x") is None
    Recorder(tape.fds, EngineArgs()).begin(INFO, [], [])
    assert tape.dump(tmp_path, "x") is None
    tape.close()


def _shortened(data: bytes) -> bytes:
    return data[:-1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: b"\0\0\0\1\xc1" + data,
        lambda d: d[:-1],
    ],
)
def test_a_file_that_is_no_recording_is_refused(
    tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    tape = Tape()
    fly(tape, [request(1, 5, 5)], depth=0, steps=4)
    path = tape.dump(tmp_path, "x")
    tape.close()
    assert path is not None
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ConfigError, match="recording"):
        Recording.read(path)
    with pytest.raises(ConfigError, match="recording"):
        Recording.read(tmp_path / "missing")


def test_the_fake_device_is_worth_replaying() -> None:
    """Guards the tests above: the fake runner's tokens depend on the whole context."""
    one, other = request(1, 12, 9), dataclasses.replace(request(1, 12, 9), seed=2)
    assert expected_tokens(one) != expected_tokens(other)
    assert np.unique(expected_tokens(one)[0]).size > 1
