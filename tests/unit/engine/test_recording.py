"""The flight recorder: what is written, what survives, and that it can be run again."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.fake_runner import expected_tokens
from support.flights import BLOCKS, BUDGET, INFO, MAX_LEN, Device, fly, request

from octavo.config import EngineArgs
from octavo.engine import recording
from octavo.engine.recording import Recorder, Recording
from octavo.engine.replay import Outcome, Replay
from octavo.engine.tape import Tape, frame_of, frames_of
from octavo.errors import ConfigError


def replay(path: Path) -> Outcome:
    return Replay(Recording.read(path), Device(), BUDGET).run(lambda plan, known: None)


@pytest.mark.slow
@examples(300)
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


Change = Callable[[dict[str, Any]], Any]


def changed(path: Path, kind: str, change: Change) -> Path:
    """The dump with the first record of that kind changed, after those that admit rows."""
    frames = [msgspec.msgpack.decode(frame) for frame in frames_of(path.read_bytes())]
    records = [frame for frame in frames if frame["type"] == kind]
    change(records[-1])
    path.write_bytes(b"".join(map(frame_of, frames)))
    return path


def array(name: str, value: int) -> Change:
    def change(record: dict[str, Any]) -> None:
        data = np.frombuffer(record["arrays"][name], "<i4").copy()
        data[-1] = value
        record["arrays"][name] = data.tobytes()

    return change


def admission(**fields: Any) -> Change:
    return lambda record: record["admitted"][0]["request"].update(fields)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("plan", array("rows", 5)),
        ("plan", array("rows", -1)),
        ("plan", array("starts", -1)),
        ("plan", array("starts", 2**31 - 1)),
        ("plan", array("chunk_lens", 0)),
        ("plan", array("chunk_lens", 2**31 - 1)),
        ("plan", array("token_ids", 50)),
        ("plan", array("token_ids", -1)),
        ("plan", array("block_ids", 0)),
        ("plan", array("block_ids", BLOCKS)),
        ("plan", array("block_cols", 16)),
        ("plan", array("block_cols", -1)),
        ("plan", array("block_rows", 5)),
        ("plan", lambda record: record.update(num_decodes=9)),
        ("plan", lambda record: record.update(num_decodes=-1)),
        ("plan", lambda record: record.update(samples=b"")),
        ("plan", lambda record: record.update(freed_rows=[9])),
        ("plan", lambda record: record["arrays"].pop("rows")),
        ("plan", lambda record: record["arrays"].update(more=b"")),
        ("plan", lambda record: record["arrays"].update(rows=b"123")),
        ("plan", admission(prompt_token_ids=[50])),
        ("plan", admission(prompt_token_ids=[])),
        ("plan", admission(prompt_token_ids=[1] * (MAX_LEN + 1))),
        ("plan", admission(stop_token_ids=[-1])),
        ("plan", admission(seed=-1)),
        ("plan", admission(params={"logit_bias": {60: 1.0}})),
        ("plan", admission(params={"temperature": -1.0})),
        ("plan", lambda record: record["admitted"].append(record["admitted"][0])),
        ("result", lambda record: record.update(token_ids=b"")),
        ("result", lambda record: record.update(token_ids=b"123")),
        ("result", lambda record: record.update(token_ids=b"\xff\xff\xff\xff")),
        ("start", lambda record: record["info"].update(block_size=0)),
        ("start", lambda record: record["info"].update(model=b"\xff")),
        ("rows", lambda record: record.update(type="end", cause="", at="")),
    ],
)
def test_a_recording_that_no_engine_wrote_is_refused(
    tmp_path: Path, kind: str, change: Change
) -> None:
    """A runner writes where a plan tells it, so nothing of this may reach one."""
    tape = Tape()
    fly(tape, [request(7, 10, 20)], depth=0, steps=1)
    path = tape.dump(tmp_path, "x")
    tape.close()
    assert path is not None
    assert Recording.read(path).steps[0].plan.admitted
    with pytest.raises(ConfigError, match="recording"):
        Recording.read(changed(path, kind, change))
