"""Octavo on one GPU beside the floor and vLLM: one table, from a clean checkout.

    python benchmarks/gpu.py                       every model and load
    python benchmarks/gpu.py --models qwen3-0.6b --loads single,mixed256 --json out.json

Weights are random, prompts are seeded token ids, decoding is greedy and ignores EOS. Each figure is
the better of
`--repeat` runs with fresh prompts after a warm-up. vLLM's figures are 0.25.1's, bf16, on one H100
80 GB HBM3, with its default settings; floors are bytes / 3.0 TB/s or flops / 766 TFLOP/s, both
measured on that GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent))


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table. `kind` says which figure of a run it shows."""

    model: str
    load: str
    kind: str
    vllm: float
    must: float
    floor: float | None = None
    lower_is_better: bool = False


LINES = (
    Line("qwen3-8b", "single", "tpot_ms", 6.815, 5.9, 4.9, True),
    Line("qwen3-8b", "single", "ttft_ms", 16.99, 13.0, 10.1, True),
    Line("qwen3-8b", "prefill", "prompt_tok_s", 42_890, 43_000, 50_600),
    Line("qwen3-8b", "mixed256", "output_tok_s", 8_138, 9_500),
    Line("qwen3-8b", "shared_prefix", "output_tok_s", 8_319, 10_000),
    Line("qwen3-8b", "chat1000", "output_tok_s", 9_352, 11_000),
    Line("qwen3-8b", "long_decode", "seconds", 10.43, 10.0, 9.1, True),
    Line("qwen3-8b", "", "kv_tokens", 394_576, 400_000),
    Line("qwen3-8b", "", "start_s", 61.0, 10.0, None, True),
    Line("qwen3-0.6b", "single", "tpot_ms", 2.066, 1.2, 0.39, True),
    Line("qwen3-0.6b", "single", "ttft_ms", 10.38, 4.0, 0.7, True),
    Line("qwen3-0.6b", "prefill", "prompt_tok_s", 357_000, 450_000, 870_000),
    Line("qwen3-0.6b", "mixed256", "output_tok_s", 19_035, 35_000),
    Line("qwen3-0.6b", "shared_prefix", "output_tok_s", 16_648, 35_000),
    Line("qwen3-0.6b", "chat1000", "output_tok_s", 21_006, 40_000),
    Line("qwen3-0.6b", "long_decode", "seconds", 2.91, 2.5, None, True),
    Line("qwen3-30b-a3b", "single", "tpot_ms", 4.876, 3.5, 2.2, True),
    Line("qwen3-30b-a3b", "prefill", "prompt_tok_s", 62_398, 80_000),
    Line("qwen3-30b-a3b", "mixed256", "output_tok_s", 3_184, 5_000),
)


def measure(
    model: str, loads: list[str], repeat: int, options: dict
) -> Iterator[tuple[str, str, float]]:
    """Yields (load, kind, value), engine by engine."""
    from octavo.bench import loads as bench_loads
    from octavo.bench.offline import OfflineEngine
    from octavo.config import EngineArgs

    start_s = time.perf_counter()
    args = EngineArgs.from_options(
        model=str(ROOT / "models" / model),
        load_format="dummy",
        gpu_memory_utilization=0.9,
        **options,
    )
    engine = OfflineEngine(args)
    yield "", "start_s", time.perf_counter() - start_s
    info = engine.core.info
    yield "", "kv_tokens", float(info.kv_capacity_tokens)
    print(f"{model}: start {info.startup_s}, memory {info.memory_bytes}", file=sys.stderr)
    for name in loads:
        report = engine.measure(bench_loads.workload(name), num_repeats=repeat)
        best = report.best
        yield name, "output_tok_s", best.output_tokens_per_s
        yield name, "prompt_tok_s", best.prompt_tokens_per_s
        yield name, "seconds", best.seconds
        yield name, "ttft_ms", best.ttft_ms.p50
        yield name, "tpot_ms", best.tpot_ms.p50 or 0.0


def table(results: dict[tuple[str, str, str], float]) -> str:
    """The rows that were measured, beside vLLM, floor and goal."""
    columns = ("floor", "vLLM", "goal", "Octavo", "x vLLM")
    head = f"{'model · load · figure':44} " + " ".join(f"{name:>10}" for name in columns)
    rows = [head, "-" * len(head)]
    for line in LINES:
        value = results.get((line.model, line.load, line.kind))
        if value is None:
            continue
        ratio = line.vllm / value if line.lower_is_better else value / line.vllm
        met = value <= line.must if line.lower_is_better else value >= line.must
        name = " · ".join(filter(None, (line.model, line.load, line.kind)))
        floor = f"{line.floor:,.6g}" if line.floor else ""
        rows.append(
            f"{name:44} {floor:>10} {line.vllm:>10,.6g} {line.must:>10,.6g} {value:>10,.6g} "
            f"{ratio:>9.2f}x {'' if met else '  short'}"
        )
    return "\n".join(rows)


def run_one(arguments: argparse.Namespace) -> list[dict]:
    """Measure one model in this process."""
    options = {k: json.loads(v) for k, v in (item.split("=", 1) for item in arguments.option)}
    wanted = {line.load for line in LINES if line.model == arguments.models}
    loads = [load for load in arguments.loads.split(",") if load in wanted]
    rows = []
    for load, kind, value in measure(arguments.models, loads, arguments.repeat, options):
        rows.append({"model": arguments.models, "load": load, "kind": kind, "value": value})
        print(f"{arguments.models} {load} {kind} {value:.6g}", file=sys.stderr, flush=True)
    return rows


def run_each(arguments: argparse.Namespace) -> list[dict]:
    """Measure each model in a process of its own: each starts cold and frees all it took."""
    rows: list[dict] = []
    for model in arguments.models.split(","):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, __file__, "--models", model, "--loads", arguments.loads]
            command += ["--repeat", str(arguments.repeat), "--json", file.name, "--alone"]
            command += [word for item in arguments.option for word in ("--option", item)]
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0:
                rows += json.loads(Path(file.name).read_text())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="qwen3-8b,qwen3-0.6b,qwen3-30b-a3b")
    parser.add_argument(
        "--loads", default="single,prefill,mixed256,shared_prefix,chat1000,long_decode"
    )
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--option", action="append", default=[], help="engine option as NAME=JSON")
    parser.add_argument("--alone", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    rows = run_one(arguments) if arguments.alone else run_each(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print(table({(row["model"], row["load"], row["kind"]): row["value"] for row in rows}))


if __name__ == "__main__":
    main()
