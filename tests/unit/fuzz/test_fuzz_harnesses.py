"""Every harness still runs, takes its own seeds, and finds nothing in a few hundred inputs. In a
process of its own: harnesses set limits for all of theirs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.run import NAMES

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fuzz.run", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_harness_runs_and_finds_nothing() -> None:
    done = run(*NAMES, "--driver", "random", "--limit", "200", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+): 200 inputs in [\d.]+ s, 0 findings", done.stdout, re.M) == [*NAMES]


def test_every_harness_is_in_the_list_and_in_the_readme() -> None:
    names = {path.stem.removeprefix("fuzz_") for path in (ROOT / "fuzz").glob("fuzz_*.py")}
    assert names == set(NAMES)
    readme = (ROOT / "fuzz" / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in names)


PLANTED = """
import sys
from pathlib import Path
sys.argv = ["run", "safetensors", "--driver", "random", "--limit", "60"]
from octavo.weights import safetensors
def careless(files):
    data = files[0].read_bytes()
    yield from [[]][len(data) > 200]
safetensors.iter_safetensors = careless
from fuzz import fuzz_safetensors, run
fuzz_safetensors.check_seeds = lambda: None
run._WORK = Path(WORK)
sys.exit(run.main())
"""


@pytest.mark.slow
def test_a_planted_bug_is_a_finding(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLANTED.replace("WORK)", f"{str(tmp_path)!r})")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "finding 1: IndexError" in done.stdout
    traces = {path: path.read_text() for path in (tmp_path / "findings").rglob("*.txt")}
    found = next(path for path, trace in traces.items() if "in careless" in trace)
    assert len(found.with_suffix("").read_bytes()) > 200
