"""What the GPU kernels compute and what they cost, at the shapes of Qwen3 8B and 0.6B.

    python -m benchmarks.kernels [--sweep] [--only SECTION ...] [--json PATH]

First every kernel is checked against float64 (or the plain twin) on fresh random input, its output
memory poisoned with NaN; then each is timed by replays of a CUDA graph over inputs that together
exceed the L2 cache, beside what torch offers for the same. `--sweep` times configurations instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.kernels.checks import CHECKS
from benchmarks.kernels.measure import records
from benchmarks.kernels.sweeps import SWEEPS
from benchmarks.kernels.timings import TIMINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time configurations instead")
    parser.add_argument("--only", nargs="*", default=[], help="sections, e.g. check_linear")
    parser.add_argument("--json", type=Path, help="write all results there")
    options = parser.parse_args()
    torch.manual_seed(0)
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    sections = SWEEPS if options.sweep else CHECKS + TIMINGS
    header = (
        f"{'kernel':18s} {'shape':34s} {'us':>10s} {'rate':>13s} {'share':>6s} {'torch us':>10s}"
    )
    for section in sections:
        name = section.__name__
        if options.only and name not in options.only and name != "time_ceilings":
            continue
        start = time.perf_counter()
        print(f"\n== {name}\n{header if not name.startswith('check') else ''}")
        try:
            section()
        except Exception:  # the other sections still count
            traceback.print_exc()
            records.append({"failed": name})
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        print(f"== {name} took {time.perf_counter() - start:.1f} s", flush=True)
        if options.json:
            device = torch.cuda.get_device_name()
            options.json.write_text(json.dumps({"device": device, "records": records}, indent=1))
    wrong = [r for r in records if r.get("ok") is False or "failed" in r]
    print(f"\n{len(wrong)} checks failed" if wrong else "\nall checks passed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
