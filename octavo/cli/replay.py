"""`octavo replay`: run a flight recording again, step by step."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.engine.recording import Recording
    from octavo.sched.plan import StepPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a dump, as the server names it when it writes one")
    parser.add_argument(
        "--device", help="run it elsewhere: cpu, cuda (default: where it was recorded)"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the steps and requests, and run nothing"
    )


def run(namespace: argparse.Namespace) -> int:
    """Exit status: 0 if every token came out as recorded, 1 otherwise."""
    try:
        from octavo.engine.recording import Recording
    except ModuleNotFoundError as error:
        raise ConfigError(f"Recordings need the package {error.name!r}: pip install it.") from error
    recording = Recording.read(namespace.file)
    _describe(recording)
    if namespace.list:
        for step in recording.steps:
            print(_line(step.plan, known=step.token_ids is not None))
        return 0
    return _run(recording, namespace.device)


def _describe(recording: Recording) -> None:
    info, steps = recording.start.info, recording.steps
    in_flight = sum(step.token_ids is None for step in steps)
    print(f"model      {info.model} ({info.architecture}, {info.dtype}, {info.device})")
    print(f"octavo     {recording.start.version}")
    print(f"ended      {recording.end.at}: {recording.end.cause}")
    span_s = steps[-1].at_s - steps[0].at_s if steps else 0.0
    print(f"steps      {len(steps)} in {span_s:.1f} s, {in_flight} of them in flight at the end")
    print(f"rows       {len(recording.rows)} occupied at the beginning")


def _line(plan: StepPlan, *, known: bool) -> str:
    num_chunks = len(plan.rows) - plan.num_decodes
    admitted = "".join(f" +{a.request.request_id}" for a in plan.admitted)
    end = "" if known else "  (no result)"
    return (
        f"step {plan.step}: {plan.num_decodes} decodes, {num_chunks} chunks of "
        f"{len(plan.token_ids)} tokens{admitted}{end}"
    )


def _run(recording: Recording, device: str | None) -> int:
    from octavo.checkpoint import locate_from
    from octavo.engine.build import build_runner
    from octavo.engine.replay import Replay

    args, info = recording.start.args, recording.start.info
    args = dataclasses.replace(
        args,
        device=device or args.device,
        kv_cache_dtype="auto" if device else args.kv_cache_dtype,
        kv_cache_memory_bytes=None,
        num_gpu_blocks_override=info.num_blocks,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
    )
    _, runner = build_runner(args, locate_from(args))
    outcome = Replay(recording, runner, info.max_num_batched_tokens).run(_announce)
    same = outcome.num_tokens - len(outcome.differences)
    print(f"replayed   {outcome.num_steps} steps; {same} of {outcome.num_tokens} tokens the same")
    for difference in outcome.differences[:10]:
        print(
            f"  step {difference.step}, request {difference.request_id}: "
            f"recorded {difference.recorded}, now {difference.replayed}"
        )
    return 1 if outcome.differences else 0


def _announce(plan: StepPlan, known: bool) -> None:
    if not known:  # it may be this one's doing
        print(f"running    {_line(plan, known=False)}", flush=True)
