"""Fuzz a parser: `python -m fuzz.run gguf --minutes 10`.

With atheris the run is guided by coverage; without it, or with `--driver random`, the same mutators
change seeds at random. A finding is written to the findings folder and the run goes on; the exit
status says whether there was any.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import importlib
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fuzz.mutators import repeated

NAMES = ("gguf", "safetensors", "config", "requests", "http", "recording", "chat_template")
_WORK = Path(__file__).parent / ".work"  # corpora and findings: not for version control


class Findings:
    """Inputs that broke a rule, one for each place in the code that they broke it in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, data: bytes, error: BaseException) -> None:
        place = _place(error)
        if place in self._seen:
            return
        self._seen.add(place)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / hashlib.sha256(place.encode()).hexdigest()[:12]
        path.write_bytes(data)
        trace = "".join(traceback.format_exception(error))
        path.with_suffix(".txt").write_text(trace, errors="backslashreplace")
        print(
            f"\nfinding {len(self._seen)}: {place}: {str(error)[:100]!r}\n  in {path}", flush=True
        )


def _place(error: BaseException) -> str:
    """The kind of error and the innermost frame of the product."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/octavo/" in frame.filename] or list(frames)
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {where}"


def load(name: str, coverage: bool = False) -> Any:
    """The harness module `fuzz_<name>`."""
    if not coverage:
        return importlib.import_module(f"fuzz.fuzz_{name}")
    import atheris

    with atheris.instrument_imports(include=["octavo", "jinja2"]):
        return importlib.import_module(f"fuzz.fuzz_{name}")


def attempt(harness: Any, data: bytes, findings: Findings) -> None:
    """Check one input; whatever comes out is a finding."""
    try:
        harness.check(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust panics are no Exceptions
        findings.add(data, error)


def run_random(harness: Any, findings: Findings, deadline_s: float, limit: int, seed: int) -> int:
    """Without coverage: change seeds. How many inputs were tried."""
    rng = random.Random(seed)
    corpus, count = harness.seeds(), 0
    while count < limit and time.monotonic() < deadline_s:
        faulthandler.dump_traceback_later(60, exit=True)  # hangs outside Python
        attempt(harness, repeated(harness.mutate, rng.choice(corpus), rng), findings)
        count += 1
    faulthandler.cancel_dump_traceback_later()
    return count


def run_atheris(
    harness: Any, findings: Findings, minutes: float, corpus: Path, limit: int, seed: int
) -> None:
    """Guided by coverage; libFuzzer ends the process."""
    import atheris

    corpus.mkdir(parents=True, exist_ok=True)
    for data in harness.seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def mutate(data: bytes, max_size: int, mutation_seed: int) -> bytes:
        rng = random.Random(mutation_seed)
        if rng.random() < 0.2:
            return atheris.Mutate(data, max_size)
        return repeated(harness.mutate, data, rng)[:max_size]

    flags = [
        f"-max_total_time={round(minutes * 60)}",
        f"-max_len={harness.MAX_LEN}",
        f"-seed={seed}",
        *("-timeout=60", "-rss_limit_mb=6000", "-print_final_stats=1", "-len_control=0"),
        *([f"-runs={limit}"] if limit else []),
        f"-artifact_prefix={corpus.parent}/",
    ]
    atheris.Setup(
        [sys.argv[0], *flags, str(corpus)],
        lambda data: attempt(harness, data, findings),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    parser.add_argument("names", choices=NAMES, nargs="+", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--minutes", type=float, default=1.0, help="for each")
    parser.add_argument("--limit", type=int, default=0, help="at most so many inputs for each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--driver", choices=("auto", "atheris", "random"), default="auto")
    parser.add_argument("--replay", type=Path, nargs="+", help="check these files only")
    options = parser.parse_args()
    if options.replay:
        harness = load(options.names[0])
        for path in options.replay:
            harness.check(path.read_bytes())
        return 0
    if options.driver != "random" and _has_atheris(options.driver):
        if len(options.names) > 1:
            raise SystemExit("libFuzzer ends the process: give one name, or --driver random")
        _guided(options.names[0], options)
    return max([_unguided(name, options) for name in options.names])


def _guided(name: str, options: argparse.Namespace) -> None:
    harness = load(name, coverage=True)
    findings = _begin(name, harness)
    corpus = _WORK / "corpus" / name
    run_atheris(harness, findings, options.minutes, corpus, options.limit, options.seed)


def _unguided(name: str, options: argparse.Namespace) -> int:
    harness = load(name)
    findings = _begin(name, harness)
    began_s = time.monotonic()
    limit = options.limit or sys.maxsize
    deadline_s = began_s + options.minutes * 60
    count = run_random(harness, findings, deadline_s, limit, options.seed)
    took_s = time.monotonic() - began_s
    print(f"{name}: {count} inputs in {took_s:.1f} s, {len(findings)} findings", flush=True)
    return 1 if len(findings) else 0


def _begin(name: str, harness: Any) -> Findings:
    from fuzz import oracle  # it imports octavo, which must not be loaded before `load`

    oracle.install()
    harness.check_seeds()
    return Findings(_WORK / "findings" / name)


def _has_atheris(driver: str) -> bool:
    with contextlib.suppress(ImportError):
        importlib.import_module("atheris")
        return True
    if driver == "atheris":
        raise SystemExit("atheris is not installed: pip install -e '.[fuzz]'")
    print("atheris is not installed: random changes, without coverage", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
