"""A real engine process with the fake runner, as the process itself sees it: many are started, so
that what it imports is felt.

`EngineArgs.model` names a JSON file that says how it behaves; see `Behaviour`. A prompt that begins
with one of the tokens below strikes as soon as its row computes the position that its second token
says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from support.fake_config import MAX_LEN, fake_config
from support.fake_runner import FakeRunner

from octavo.config import EngineArgs, EngineConfig
from octavo.engine import process
from octavo.engine.core import Runner
from octavo.engine.messages import Configure
from octavo.errors import ConfigError
from octavo.sched.plan import StepPlan, StepResult

BLOCK = 8
NUM_BLOCKS = 600
KILLS, RAISES, HANGS, FORKS = 49, 48, 47, 46  # first tokens of prompts that strike


@dataclass
class Behaviour:
    step_s: float = 0.0
    start: str = "ok"  # or: dies, refuses, hangs

    def write(self, path: Path) -> EngineArgs:
        """The arguments of an engine that behaves so."""
        path.write_text(json.dumps(asdict(self)))
        return EngineArgs(model=str(path), block_size=BLOCK, max_model_len=MAX_LEN)


class Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Report:
    seconds: ClassVar = {"load": 0.1}
    memory_bytes: ClassVar = {"kv": 1}


class DangerousRunner:
    num_blocks = NUM_BLOCKS
    report = Report()

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._fake = FakeRunner(NUM_BLOCKS, BLOCK)
        self._has_forked = False
        self._strikes: dict[int, tuple[int, int]] = {}  # by row: what, at which position

    def submit(self, plan: StepPlan) -> Done:
        for admission in plan.admitted:
            what, when, *_ = (*admission.request.prompt_token_ids, 0, 0)
            self._strikes[admission.row] = (what, when)
        ends = (plan.starts + plan.chunk_lens).tolist()
        for row, end in zip(plan.rows.tolist(), ends, strict=True):
            what, when = self._strikes[row]
            if end > when:
                self._strike(what)
        time.sleep(self._step_s)
        return Done(self._fake.execute(plan))

    def _strike(self, what: int) -> None:
        if what == KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == RAISES:
            raise RuntimeError("device-side assert")
        if what == HANGS:
            time.sleep(1000)
        if what == FORKS and not self._has_forked:
            self._has_forked = True
            subprocess.Popen(["sleep", "10"], close_fds=False)

    def prepare_more(self) -> bool:
        return False

    def close(self) -> None:
        pass


def load() -> process.BuildParts:
    def build(configure: Configure) -> tuple[EngineConfig, Runner]:
        behaviour = Behaviour(**json.loads(Path(configure.args.model).read_text()))
        if behaviour.start == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour.start == "refuses":
            raise ConfigError("no room today")
        if behaviour.start == "hangs":
            time.sleep(1000)
        config = fake_config(configure.args, configure.checkpoint)
        return config, DangerousRunner(behaviour.step_s)

    return build


def run() -> None:
    status = process.main(sys.argv[1:], load)
    sys.stderr.flush()
    os._exit(status)
