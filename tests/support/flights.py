"""Engines without a device that write a flight recording, and die."""

from __future__ import annotations

from collections.abc import Sequence

from support.fake_runner import FakeRunner

from octavo.config import EngineArgs, SchedulerConfig
from octavo.engine.recording import RecordedRunner, Recorder
from octavo.engine.tape import Tape
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
    kv_cache_dtype="float32",
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
