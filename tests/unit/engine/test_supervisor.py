"""`Supervisor` over real processes that die, hang and are stopped. The runner is the fake one, so
that every request's tokens are known.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.engine_child import (
    FORKS,
    HANGS,
    KILLS,
    RAISES,
    Behaviour,
)
from support.fake_config import fake_checkpoint
from support.fake_runner import expected_tokens

from octavo.engine.client import EngineProcess
from octavo.engine.supervisor import Patience, Supervisor
from octavo.errors import ConfigError, EngineDeadError
from octavo.types import EngineRequest, Finish, SamplingParams, StepOutputs

PATIENCE = Patience(step_s=1.0, silence_s=1.0, max_restarts=3, spare_after_s=None)
_PATHS = [str(Path(__file__).parents[n]) for n in (3, 2)]  # the checkout, and its tests


class FakeProcess(EngineProcess):
    command = (
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = {_PATHS!r}; from support import engine_child as e; e.run()",
    )


class Rig:
    """A supervisor, and the means to disturb what it supervises."""

    def __init__(self, supervisor: Supervisor, behave: Callable[..., object]) -> None:
        self.supervisor = supervisor
        self.behave = behave
        self.died = asyncio.Event()
        supervisor.on_death(self.died.set)

    @property
    def pid(self) -> int | None:
        """Of the present engine process."""
        connection = self.supervisor._connection
        return None if connection is None else connection._process.process.pid

    @property
    def spare_pid(self) -> int | None:
        spare = self.supervisor._nursery._spare
        return None if spare is None else spare.process.pid

    def signal(self, sig: signal.Signals) -> int:
        pid = self.pid
        assert pid is not None
        os.kill(pid, sig)
        return pid

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            await asyncio.sleep(0.005)

    async def until_replaced(self, pid: int) -> None:
        await self.until(lambda: self.pid not in (None, pid))

    def make(self, prompt: Sequence[int], max_tokens: int = 30) -> EngineRequest:
        request_id = self.supervisor.next_request_id()
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(),
            max_total_len=len(prompt) + max_tokens,
            seed=request_id,
        )

    async def run(self, request: EngineRequest) -> tuple[list[int], Finish]:
        """The request's whole output."""
        return await read(self.supervisor.submit(request))

    async def expect(self, requests: Sequence[EngineRequest]) -> None:
        """Run them together: each must receive what it would have received undisturbed."""
        results = await asyncio.gather(*map(self.run, requests))
        for request, (token_ids, finish) in zip(requests, results, strict=True):
            assert (token_ids, finish.reason) == expected_tokens(request)


async def read(stream: Any) -> tuple[list[int], Finish]:
    token_ids: list[int] = []
    while True:
        update = await stream.next()
        token_ids += update.token_ids
        if update.finish is not None:
            return token_ids, update.finish


def with_rig(
    tmp_path: Path,
    body: Callable[[Rig], Awaitable[None]],
    *,
    patience: Patience = PATIENCE,
    crash_dir: bool = False,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    **behaviour: Any,
) -> None:
    def behave(**changes: Any) -> Any:
        args = Behaviour(**(behaviour | changes)).write(tmp_path / "behaviour.json")
        return dataclasses.replace(
            args, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
        )

    async def main() -> None:
        args = behave()
        process = FakeProcess(tmp_path / "crashes" if crash_dir else None)
        supervisor = await Supervisor.start(process, args, fake_checkpoint(), patience)
        rig = Rig(supervisor, behave)
        try:
            await asyncio.wait_for(body(rig), 60)
        finally:
            await supervisor.close()
        assert supervisor.num_live == 0

    asyncio.run(main())


def prompts(rng: random.Random, count: int) -> list[list[int]]:
    """Harmless ones; some share their beginning."""
    head = [rng.randrange(40) for _ in range(24)]
    return [
        head[: rng.choice((0, 8, 24))] + [rng.randrange(40) for _ in range(rng.randrange(1, 30))]
        for _ in range(count)
    ]


def test_kills_at_random_moments_change_no_token(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rng = random.Random(5)
        running = asyncio.create_task(
            rig.expect([rig.make(p, rng.randrange(20, 150)) for p in prompts(rng, 24)])
        )
        for _ in range(4):
            await asyncio.sleep(rng.random() * 0.2)
            await rig.until_replaced(rig.signal(signal.SIGKILL))
        await running
        assert rig.supervisor.counts.num_restarts == 4
        assert rig.supervisor.counts.num_isolated == 0
        assert rig.supervisor.counts.num_resumed > 0

    with_rig(tmp_path, body, step_s=0.002)


@pytest.mark.slow
@pytest.mark.parametrize("first", [KILLS, RAISES])
@pytest.mark.parametrize("strikes_at", [0, 20])
def test_a_poison_request_is_found_and_harms_itself_only(
    tmp_path: Path, first: int, strikes_at: int
) -> None:
    async def body(rig: Rig) -> None:
        rng = random.Random(7)
        harmless = [rig.make(p) for p in prompts(rng, 9)]
        poison = rig.make([first, strikes_at, 1, 2, 3], 40)
        others = asyncio.create_task(rig.expect(harmless))
        await asyncio.sleep(0)
        token_ids, finish = await rig.run(poison)
        assert finish.reason == "error"
        assert "ended the engine more than twice" in finish.message
        assert token_ids == expected_tokens(poison)[0][: len(token_ids)]
        await others
        assert rig.supervisor.counts.num_isolated == 1
        await rig.expect([rig.make([1, 2, 3])])

    with_rig(tmp_path, body, step_s=0.002)


@pytest.mark.slow
def test_two_poison_requests_are_both_found(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rng = random.Random(8)
        others = asyncio.create_task(rig.expect([rig.make(p) for p in prompts(rng, 6)]))
        ends = await asyncio.gather(*(rig.run(rig.make([KILLS, 0, i])) for i in range(2)))
        assert [finish.reason for _, finish in ends] == ["error", "error"]
        await others
        assert rig.supervisor.counts.num_isolated == 2

    with_rig(tmp_path, body)


@pytest.mark.slow
def test_a_request_that_hangs_the_engine_is_found(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        _, finish = await rig.run(rig.make([HANGS, 8]))
        assert finish.reason == "error"
        assert "finished no step" in rig.supervisor._cause
        await rig.expect([rig.make([1, 2, 3])])

    with_rig(tmp_path, body)


@pytest.mark.slow
def test_a_stopped_engine_is_replaced(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        running = asyncio.create_task(rig.expect([rig.make([1, 2, 3], 150)]))
        await asyncio.sleep(0.1)
        pid = rig.signal(signal.SIGSTOP)
        await rig.until(lambda: rig.supervisor.trouble is not None)
        await rig.until_replaced(pid)
        await running
        assert rig.supervisor.trouble is None

    with_rig(
        tmp_path, body, step_s=0.003, patience=Patience(step_s=60, silence_s=1, spare_after_s=0.1)
    )


def test_an_idle_engine_that_dies_is_replaced(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        pid = rig.signal(signal.SIGKILL)
        await rig.until(lambda: rig.pid is None)
        assert rig.supervisor.trouble == "the engine is being restarted"
        await rig.expect([rig.make([1, 2, 3])])
        assert rig.pid != pid

    with_rig(tmp_path, body)


@pytest.mark.parametrize(("start", "says"), [("dies", "signal 9"), ("refuses", "no room today")])
def test_an_engine_that_cannot_start_again_ends_with_its_cause(
    tmp_path: Path, start: str, says: str
) -> None:
    async def body(rig: Rig) -> None:
        stream = rig.supervisor.submit(rig.make([1, 2, 3], 200))
        await rig.until(lambda: rig.supervisor._journal.num_in_engine == 1)
        rig.behave(start=start)
        rig.signal(signal.SIGKILL)
        await rig.died.wait()
        assert says in str(rig.supervisor.death)
        assert not rig.supervisor.is_alive
        _, finish = await read(stream)
        assert finish.reason == "error"
        with pytest.raises(EngineDeadError, match=says):
            rig.supervisor.submit(rig.make([1]))

    patience = dataclasses.replace(PATIENCE, max_restarts=1)
    with_rig(tmp_path, body, patience=patience, step_s=0.01)


def test_requests_come_and_go_while_there_is_no_engine(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.signal(signal.SIGKILL)
        await rig.until(lambda: rig.pid is None)
        given_up = rig.supervisor.submit(rig.make([1, 2]))
        kept = rig.make([4, 5, 6])
        running = asyncio.create_task(rig.expect([kept]))
        await asyncio.sleep(0)
        rig.supervisor.abort([1, 99])
        assert (await read(given_up))[1] == Finish(1, "abort")
        await running

    with_rig(tmp_path, body)


@pytest.mark.slow
def test_an_abort_needs_no_engine_that_answers(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        stream = rig.supervisor.submit(rig.make([1, 2], 200))
        await rig.until(lambda: rig.supervisor._journal.num_in_engine == 1)
        rig.signal(signal.SIGSTOP)
        rig.supervisor.abort([1])
        assert (await read(stream))[1] == Finish(1, "abort")
        assert rig.supervisor.num_live == 0

    with_rig(tmp_path, body, step_s=0.01)


def test_a_request_that_came_just_after_a_death_is_not_blamed_for_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        for _ in range(3):  # each is sent to an engine that is dead already
            pid = rig.signal(signal.SIGKILL)
            request = rig.make([1, 2, 3], 200)
            running = asyncio.create_task(rig.expect([request]))
            await asyncio.sleep(0)
            await rig.until_replaced(pid)
            await running
        assert rig.supervisor.counts.num_isolated == 0

    with_rig(tmp_path, body, crash_dir=True)


@pytest.mark.slow
def test_kills_during_a_long_prompt_are_not_its_own_doing(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        request = rig.make([i % 40 for i in range(200)], 30)
        running = asyncio.create_task(rig.expect([request]))
        for chunk in range(3):  # ever further, and never as far as a token
            await asyncio.sleep(0.1 + 0.15 * chunk)
            await rig.until_replaced(rig.signal(signal.SIGKILL))
        await running

    with_rig(tmp_path, body, step_s=0.1, crash_dir=True, max_num_batched_tokens=16, max_num_seqs=4)


@pytest.mark.slow
def test_an_engine_that_is_broken_ends_and_condemns_next_to_nobody(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        requests = [rig.make([RAISES, 0, i]) for i in range(12)]
        ends = await asyncio.gather(*map(rig.run, requests))
        await rig.died.wait()
        assert "device-side assert" in str(rig.supervisor.death)
        condemned = [finish for _, finish in ends if "twice" in finish.message]
        assert len(condemned) <= 2

    with_rig(tmp_path, body)


def test_a_restart_that_hangs_is_given_up(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.behave(start="hangs")
        rig.signal(signal.SIGKILL)
        await rig.until(lambda: "not ready after" in rig.supervisor._cause)
        rig.behave(start="ok")
        await rig.expect([rig.make([1, 2, 3])])

    with_rig(tmp_path, body, patience=dataclasses.replace(PATIENCE, start_s=1.0))


def test_a_child_of_the_engine_does_not_hide_its_death(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        running = asyncio.create_task(rig.expect([rig.make([FORKS, 0, 1], 60)]))
        await rig.until(lambda: rig.supervisor._journal.num_in_engine == 1)
        await asyncio.sleep(0.1)
        await rig.until_replaced(rig.signal(signal.SIGKILL))
        await running

    with_rig(tmp_path, body, step_s=0.01)


@pytest.mark.slow
def test_closing_leaves_no_process_at_any_moment(tmp_path: Path) -> None:
    made: list[EngineProcess] = []

    class RememberedProcess(FakeProcess):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    async def main(wait_s: float, spare_after_s: float | None) -> None:
        args = Behaviour().write(tmp_path / "b.json")
        patience = dataclasses.replace(PATIENCE, spare_after_s=spare_after_s)
        supervisor = await Supervisor.start(RememberedProcess(), args, fake_checkpoint(), patience)
        os.kill(made[-1].process.pid, signal.SIGKILL)
        await asyncio.sleep(wait_s)
        await supervisor.close()
        assert all(process.process.returncode is not None for process in made)

    for wait_s in (0.0, 0.02, 0.15):
        for spare_after_s in (None, 0.0, 0.01):
            asyncio.run(main(wait_s, spare_after_s))


def test_gauges_do_not_freeze_when_an_engine_dies(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        seen: list[StepOutputs] = []
        rig.supervisor.add_listener(seen.append)
        running = asyncio.create_task(rig.expect([rig.make([1, 2, 3], 100)]))
        await rig.until(lambda: bool(seen) and seen[-1].stats.num_running == 1)
        rig.signal(signal.SIGKILL)
        await rig.until(lambda: rig.pid is None)
        assert (seen[-1].stats.num_running, seen[-1].stats.num_waiting) == (0, 1)
        await running

    with_rig(tmp_path, body, step_s=0.005)


def test_a_spare_process_takes_over_and_is_replaced_in_turn(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        for _ in range(2):
            await rig.until(lambda: rig.spare_pid is not None)
            spare = rig.spare_pid
            await rig.until_replaced(rig.signal(signal.SIGKILL))
            assert rig.pid == spare
        await rig.until(lambda: rig.spare_pid is not None)
        spare = rig.spare_pid
        assert spare is not None
        os.kill(spare, signal.SIGKILL)  # a spare may die, too
        os.waitid(os.P_PID, spare, os.WEXITED | os.WNOWAIT)
        await rig.until_replaced(rig.signal(signal.SIGKILL))
        await rig.expect([rig.make([1, 2, 3])])

    with_rig(tmp_path, body, patience=Patience(spare_after_s=0.05))


def test_a_first_start_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    args = Behaviour(start="refuses").write(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="no room today"):
        asyncio.run(Supervisor.start(FakeProcess(), args, fake_checkpoint(), PATIENCE))
