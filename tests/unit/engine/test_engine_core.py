"""`EngineCore` with the fake runner: the step function and what it says of itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_config import fake_checkpoint, fake_config
from support.fake_runner import FakeRunner, expected_tokens

from octavo.config import EngineArgs, EngineConfig
from octavo.engine.core import EngineCore
from octavo.errors import ConfigError
from octavo.sched.plan import StepPlan, StepResult
from octavo.types import EngineRequest, Finish, SamplingParams, StepOutputs

BLOCK = 8


@dataclasses.dataclass
class Step:
    """Runs when it is waited for, as on a device."""

    runner: DeviceRunner
    plan: StepPlan

    def wait(self) -> StepResult:
        if self.runner.broken_at_wait:
            raise RuntimeError("device lost")
        return self.result

    def __post_init__(self) -> None:
        self.result = self.runner.fake.execute(self.plan)


@dataclasses.dataclass
class Report:
    seconds: dict[str, float]
    memory_bytes: dict[str, int]


def _without_chunks(plan: StepPlan) -> StepPlan:
    """The rows are brought up to date, nothing is computed."""
    return dataclasses.replace(
        plan, rows=plan.rows[:0], token_ids=plan.token_ids[:0], samples=plan.samples[:0]
    )


class DeviceRunner:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.report = Report({"load": 1.0}, {"kv": 2})
        self.fake = FakeRunner(num_blocks, BLOCK)
        self.interrupt: BaseException | None = None
        self.broken_at_wait = False
        self.starts: list[list[int]] = []

    def submit(self, plan: StepPlan) -> Step:
        self.starts.append(plan.starts.tolist())
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            self.fake.execute(_without_chunks(plan))
            raise interrupt
        return Step(self, plan)

    def prepare_more(self) -> bool:
        return False


def config(**options: Any) -> EngineConfig:
    return fake_config(EngineArgs(block_size=BLOCK, **options), fake_checkpoint())


def make(num_blocks: int = 40, **options: Any) -> tuple[EngineCore, DeviceRunner]:
    runner = DeviceRunner(num_blocks)
    return EngineCore(config(**options), runner), runner


def request(request_id: int, prompt_len: int = 20, max_tokens: int = 5) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(range(prompt_len)),
        params=SamplingParams(),
        max_total_len=prompt_len + max_tokens,
        seed=request_id,
    )


def outputs_of(core: EngineCore) -> Iterator[StepOutputs]:
    while core.has_work:
        if (outputs := core.step()) is not None:
            yield outputs


def run(core: EngineCore) -> tuple[dict[int, list[int]], dict[int, Finish]]:
    tokens: dict[int, list[int]] = {}
    finishes: dict[int, Finish] = {}
    for outputs in outputs_of(core):
        for request_id, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
            tokens.setdefault(request_id, []).append(token)
        finishes |= {finish.request_id: finish for finish in outputs.finished}
    return tokens, finishes


@pytest.mark.parametrize("is_async", [False, True])
def test_requests_get_their_tokens_and_one_finish(is_async: bool) -> None:
    core, _ = make(async_scheduling=is_async)
    for request_id in (1, 2, 3):
        core.add(request(request_id, 10 * request_id))
    tokens, finishes = run(core)
    for request_id in (1, 2, 3):
        assert tokens[request_id] == expected_tokens(request(request_id, 10 * request_id))[0]
    assert sorted(finishes) == [1, 2, 3]
    assert not core.has_work
    assert core.step() is None
    core.check_integrity()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_deadline_is_told_wherever_its_request_is(is_async: bool, num_steps: int) -> None:
    core, _ = make(async_scheduling=is_async)
    late = dataclasses.replace(request(1, max_tokens=20), deadline_s=time.monotonic() + 0.05)
    core.add(late)
    tokens, finishes = [], []
    for _ in range(num_steps):
        if (outputs := core.step()) is not None:
            tokens += outputs.token_ids
            finishes += outputs.finished
    time.sleep(0.06)
    finishes += [finish for outputs in outputs_of(core) for finish in outputs.finished]
    assert finishes == [Finish(1, "timeout")]
    assert tokens == expected_tokens(late)[0][: len(tokens)]
    assert core.step() is None
    core.check_integrity()


def test_one_step_is_in_flight_when_scheduling_ahead() -> None:
    core, _ = make(async_scheduling=True)
    core.add(request(1))
    assert core.step() is None
    outputs = core.step()
    assert outputs is not None
    assert outputs.request_ids == [1]
    assert [finish.reason for finish in core.abort([1]).finished] == ["abort"]
    assert core.has_work  # the step that is still out
    late = core.step()
    assert late is not None
    assert late.request_ids == []
    assert not core.has_work


def test_what_it_says_of_itself() -> None:
    core, _ = make(num_blocks=11)
    assert core.info.num_blocks == 10
    assert core.info.kv_capacity_tokens == 80
    assert core.info.max_model_len == 80  # of the model's 256
    assert core.info.startup_s == {"load": 1.0}
    assert core.info.memory_bytes == {"kv": 2}


def test_a_context_that_was_asked_for_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"256 tokens.*room for 80"):
        make(num_blocks=11, max_model_len=256)
    assert make(num_blocks=11, max_model_len=80)[0].info.max_model_len == 80


def test_a_step_lasts_from_its_submission_not_from_the_last_request() -> None:
    core, _ = make()
    time.sleep(0.05)
    core.add(request(1))
    assert all(outputs.stats.step_s < 0.05 for outputs in outputs_of(core))


def test_an_interrupted_step_leaves_no_blocks_that_nobody_wrote() -> None:
    """Ctrl-C in the middle of a prompt: the next request with the same beginning computes it."""
    core, runner = make()
    core.add(request(1))
    runner.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        core.step()
    core.abort([1])
    assert not core.has_work
    core.check_integrity()
    core.add(request(2))
    tokens, _ = run(core)
    assert runner.starts[1] == [0]
    assert tokens[2] == expected_tokens(request(2))[0]


def test_a_step_that_fails_while_it_is_waited_for_is_gone_too() -> None:
    core, runner = make(async_scheduling=True)
    core.add(request(1))
    runner.broken_at_wait = True
    core.step()
    with pytest.raises(RuntimeError, match="device lost"):
        core.step()
    runner.broken_at_wait = False
    core.abort([1])
    run(core)
    core.add(request(2))
    assert run(core)[0][2] == expected_tokens(request(2))[0]


def test_the_gauges_do_not_forget_who_is_left_when_one_is_aborted() -> None:
    core, _ = make()
    for request_id in (1, 2):
        core.add(request(request_id, max_tokens=20))
    for _ in range(3):
        core.step()
    left = core.abort([1])
    assert left.finished == [Finish(1, "abort")]
    assert (left.stats.num_running, left.stats.num_waiting) == (1, 0)
    assert left.stats.kv_usage > 0
