"""Octavo on a CPU beside OpenVINO GenAI and llama.cpp: the same .gguf file, the same token ids.

    python benchmarks/cpu.py --peer-python /path/to/venv/bin/python [--isa "" avx2] [--json FILE]

Each engine lives in a process of its own, and they take turns, round after round, so that a slow
minute of the machine hits all of them. A round takes, for B sequences of random tokens handed over
at once, greedy, EOS ignored:
    prefill  all prompt tokens / time to generate one token for each
    decode   further output tokens / the further time that they take
Rates are medians over the rounds; a ratio is the median of the rounds' own ratios, of
runs that were seconds apart.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOADS = {  # name: (sequences, prompt tokens, output tokens)
    "B1": (1, 512, 64),
    "B16": (16, 128, 96),
    "B32": (32, 128, 96),
}
Generate = Callable[[list[list[int]], int], None]
Results = dict[str, dict[str, dict[str, list[float]]]]  # by engine, load, and what was measured


# ---- engines, each in its own process; every one returns a function (prompts, num_tokens)


def octavo(gguf: str, threads: int, isa: str) -> Generate:
    from octavo.kernels.cpu import library
    from octavo.llm import LLM
    from octavo.types import SamplingParams

    if not library.use_isa(isa):
        raise SystemExit(f"this CPU has no {isa}")
    llm = LLM("smollm2-135m", num_threads=threads, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        llm.generate(prompts, params, use_tqdm=False)

    return generate


def openvino_genai(gguf: str, threads: int, isa: str) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 512
    scheduler.enable_prefix_caching = False
    options = {"INFERENCE_NUM_THREADS": threads}
    pipeline = genai.ContinuousBatchingPipeline(gguf, scheduler, "CPU", options, {})

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        pipeline.generate(ids, [config] * len(ids))

    return generate


def llama_cpp(gguf: str, threads: int, isa: str) -> Generate:
    import llama_cpp as low

    low.llama_backend_init()
    model_params = low.llama_model_default_params()
    # Weights repacked for AMX end in a segmentation fault here (0.3.36, Sapphire Rapids).
    model_params.use_extra_bufts = "amx" not in Path("/proc/cpuinfo").read_text()
    model = low.llama_model_load_from_file(gguf.encode(), model_params)
    params = low.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 16384, 4096, 512
    params.n_seq_max, params.n_threads, params.n_threads_batch = 32, threads, threads
    params.kv_unified = True  # else each sequence has a 32nd of the cells
    context = low.llama_init_from_model(model, params)
    vocab_size = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
    batch = low.llama_batch_init(8192, 0, 1)

    def add(token: int, position: int, sequence: int, wants_logits: bool) -> None:
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, wants_logits
        batch.n_tokens += 1

    def decode() -> None:
        if low.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        import numpy as np

        low.llama_memory_clear(low.llama_get_memory(context), True)
        batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                add(token, position, sequence, position == len(prompt) - 1)
        rows = [(i + 1) * len(prompts[0]) - 1 for i in range(len(prompts))]
        for step in range(num_tokens):
            decode()
            chosen = [
                int(
                    np.ctypeslib.as_array(
                        low.llama_get_logits_ith(context, r), (vocab_size,)
                    ).argmax()
                )
                for r in rows
            ]
            batch.n_tokens = 0
            for sequence, token in enumerate(chosen):
                add(token, len(prompts[sequence]) + step, sequence, True)
            rows = list(range(len(prompts)))

    return generate


# Several of Octavo run beside each other as "octavo", "octavo:avx2" and so on.
ENGINES = {"octavo": octavo, "openvino_genai": openvino_genai, "llama_cpp": llama_cpp}


def work(engine: str, gguf: str, threads: int, isa: str) -> None:
    """Read loads from stdin, answer with rates."""
    start_s = time.perf_counter()
    generate = ENGINES[engine](gguf, threads, isa)
    rng = random.Random(0)

    def prompts(num: int, length: int) -> list[list[int]]:
        return [[rng.randrange(1000, 40000) for _ in range(length)] for _ in range(num)]

    generate(prompts(1, 8), 1)
    _answer({"ready_s": time.perf_counter() - start_s})
    for line in sys.stdin:
        num, prompt_len, num_tokens = json.loads(line)
        times = []
        for n in (1, 1 + num_tokens):
            fresh = prompts(num, prompt_len)
            start_s = time.perf_counter()
            generate(fresh, n)
            times.append(time.perf_counter() - start_s)
        prefill = num * prompt_len / times[0]
        _answer({"prefill": prefill, "decode": num * num_tokens / (times[1] - times[0])})


def _answer(values: dict[str, float]) -> None:
    print("@" + json.dumps(values), flush=True)


# ---- the conductor


class Worker:
    def __init__(self, engine: str, python: str, arguments: list[str], pythonpath: str) -> None:
        command = [python, __file__, "--worker", engine, *arguments]
        environment = {**os.environ, "PYTHONPATH": pythonpath}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.ready_s = self.read()["ready_s"]

    def read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")

    def run(self, load: tuple[int, int, int]) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(load) + "\n")
        self.process.stdin.flush()
        return self.read()


def find_pythons(peer_pythons: list[str]) -> dict[str, str]:
    """Engine -> the first interpreter that has it."""
    found = {"octavo": sys.executable}
    for python in [sys.executable, *peer_pythons]:
        for engine in ENGINES:
            check = f"import importlib.util as u; raise SystemExit(u.find_spec({engine!r}) is None)"
            if engine not in found and not subprocess.run([python, "-c", check]).returncode:
                found[engine] = python
    return found


def table(results: Results, ready: dict[str, float]) -> str:
    """Markdown: a row for each engine, and one for Octavo as a multiple of it."""
    columns = [(load, what) for what in ("prefill", "decode") for load in results["octavo"]]
    lines = [
        "| tok/s | " + " | ".join(f"{what} {load}" for load, what in columns) + " | ready, s |",
        "| --- |" + " --: |" * (len(columns) + 1),
    ]
    own = results["octavo"]
    for engine, loads in results.items():
        rates = [f"{statistics.median(loads[load][what]):,.0f}" for load, what in columns]
        lines.append(f"| {engine} | {' | '.join(rates)} | {ready[engine]:.1f} |")
        if engine != "octavo":
            pairs = [zip(own[load][what], loads[load][what], strict=True) for load, what in columns]
            ratios = [f"{statistics.median(a / b for a, b in pair):.2f}x" for pair in pairs]
            lines.append(f"| Octavo against it | {' | '.join(ratios)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", action="append", default=[], help="may be repeated")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", nargs="*", default=list(LOADS), choices=LOADS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--isa",
        nargs="*",
        default=[],
        help="also Octavo held to these: avx512, avxvnni, avx2, generic",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--gguf", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.gguf, args.threads, "".join(args.isa))
        return
    from octavo.checkpoint.builtin import ensure_builtin

    gguf = str(ensure_builtin("smollm2-135m", progress=False) / "model.gguf")
    arguments = ["--gguf", gguf, "--threads", str(args.threads)]
    root = str(Path(__file__).parents[1])
    workers = {
        engine: Worker(engine, python, arguments, root if engine == "octavo" else "")
        for engine, python in find_pythons(args.peer_python).items()
        if engine in args.engines
    }
    for isa in args.isa:
        held = [*arguments, "--isa", isa]
        workers[f"octavo:{isa}"] = Worker("octavo", sys.executable, held, root)
    results: Results = {
        engine: {load: {"prefill": [], "decode": []} for load in args.loads} for engine in workers
    }
    for _ in range(args.rounds):
        for load in args.loads:
            for engine, worker in workers.items():
                for what, rate in worker.run(LOADS[load]).items():
                    results[engine][load][what].append(rate)
    ready = {engine: worker.ready_s for engine, worker in workers.items()}
    print(table(results, ready))
    if args.json:
        args.json.write_text(json.dumps({"ready_s": ready, "rates": results}, indent=2))


if __name__ == "__main__":
    main()
