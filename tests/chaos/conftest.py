"""Faults against real servers, and the table of what they did.

`--chaos-rounds N` says how often each fault is injected; the default keeps the suite short.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chaos import Ledger, Reference, make_reference
from support.server import RunningServer, running_server

_LEDGERS: list[Ledger] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-rounds", type=int, default=4, help="how often each fault strikes")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos-rounds"))


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Where a test counts; must be clean at its end."""
    ledger = Ledger(request.node.name.removeprefix("test_"))
    _LEDGERS.append(ledger)
    yield ledger
    assert ledger.num_broken == 0, ledger.notes
    assert ledger.num_different == 0, ledger.notes


@pytest.fixture(scope="session")
def reference(smollm2_dir: Path) -> Reference:
    """What every prompt of the load is answered with when nothing goes wrong."""
    with running_server("--no-spare-engine") as server:
        return make_reference(server)


@pytest.fixture
def server(smollm2_dir: Path, tmp_path: Path) -> Iterator[RunningServer]:
    with running_server("--crash-dir", str(tmp_path / "crashes")) as running:
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _LEDGERS:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"{'fault':42} {'injected':>8} {'streams':>8} {'broken':>7} {'differ':>7}  "
        "recovery s: p50   p90   max  longest pause"
    )
    for ledger in _LEDGERS:
        gaps = sorted(ledger.recoveries_s)
        shown = ""
        if gaps:
            p90 = gaps[int(0.9 * (len(gaps) - 1))]
            shown = f"{statistics.median(gaps):15.2f} {p90:5.2f} {gaps[-1]:5.2f}"
        counts = (ledger.num_faults, ledger.num_streams, ledger.num_broken, ledger.num_different)
        write(
            f"{ledger.name:42} {counts[0]:8} {counts[1]:8} {counts[2]:7} {counts[3]:7} "
            f"{shown:27} {ledger.longest_pause_s:14.2f}"
        )
