"""report.png: one page that shows how a run against a server went."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from octavo.bench.client import Exchange
from octavo.bench.report import Percentiles, ServeReport, Timing

_NUM_BINS = 80
_BLUE, _ORANGE, _GREEN, _PURPLE = "#3465a4", "#d9730d", "#2e7d32", "#75507b"


def write_plot(path: Path, report: ServeReport, exchanges: Sequence[Exchange]) -> None:
    """Throughput over time, the distributions of the three latencies, concurrency over time."""
    figure = Figure(figsize=(12, 9), layout="constrained")  # no pyplot: nothing global to clean up
    grid = figure.add_gridspec(3, 3, height_ratios=(1.15, 1, 1))
    figure.suptitle(_title(report), fontsize=13, x=0.01, ha="left")
    end_s = max(exchange.end_s for exchange in exchanges)
    throughput = figure.add_subplot(grid[0, :])
    _draw_throughput(throughput, report, exchanges, end_s)
    timings = [timing for exchange in exchanges if (timing := exchange.timing()) is not None]
    for column, (name, values, percentiles, colour) in enumerate(_latencies(report, timings)):
        _draw_distribution(figure.add_subplot(grid[1, column]), name, values, percentiles, colour)
    concurrency = figure.add_subplot(grid[2, :], sharex=throughput)
    _draw_concurrency(concurrency, exchanges, end_s)
    for axes in figure.axes:
        if axes.get_legend() is not None:
            axes.set_title(axes.get_title(), pad=22)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)


def _title(report: ServeReport) -> str:
    figures = report.figures
    failed = f", {report.num_failed} failed" if report.num_failed else ""
    return (
        f"{report.facts.model}: {report.facts.workload}, {figures.num_requests} requests in "
        f"{figures.seconds:.1f} s{failed}"
    )


def _latencies(
    report: ServeReport, timings: Sequence[Timing]
) -> list[tuple[str, list[float], Percentiles, str]]:
    tpot = [timing.tpot_ms for timing in timings if timing.tpot_ms is not None]
    ttft = [timing.ttft_ms for timing in timings]
    e2e = [timing.e2e_ms for timing in timings]
    return [
        ("Time to first token (TTFT)", ttft, report.figures.ttft_ms, _ORANGE),
        ("Time per output token (TPOT)", tpot, report.figures.tpot_ms, _GREEN),
        ("End to end (E2E)", e2e, report.e2e_ms, _PURPLE),
    ]


def _draw_throughput(
    axes: Axes, report: ServeReport, exchanges: Sequence[Exchange], end_s: float
) -> None:
    edges = np.linspace(0, end_s, _NUM_BINS + 1)
    rates = np.diff(_tokens_until(edges, exchanges)) / np.diff(edges)
    axes.stairs(rates, edges, fill=True, color=_BLUE, alpha=0.75)
    mean = report.figures.output_tokens_per_s
    axes.axhline(mean, color="black", linestyle="--", linewidth=1.2, label=f"mean {mean:,.1f}")
    _legend_above(axes)
    axes.set(title="Output throughput", xlabel="time (s)", ylabel="output tokens/s")
    axes.set_xlim(0, end_s)
    axes.set_ylim(bottom=0)


def _tokens_until(
    edges: npt.NDArray[np.float64], exchanges: Sequence[Exchange]
) -> npt.NDArray[np.float64]:
    """Output tokens by each moment. An answer's tokens are shared evenly among its chunks, and a
    chunk's are spread over the time since the chunk before it: they were made then.
    """
    chunks = [
        (earlier, later, exchange.num_output_tokens / len(exchange.chunk_s))
        for exchange in exchanges
        for earlier, later in itertools.pairwise([*exchange.chunk_s[:1], *exchange.chunk_s])
    ]
    if not chunks:
        return np.zeros_like(edges)
    begins, ends, weights = np.array(chunks).T
    spans = np.maximum(ends - begins, 1e-9)
    return np.array([weights @ np.clip((edge - begins) / spans, 0, 1) for edge in edges])


def _legend_above(axes: Axes) -> None:
    """Between the title and the axes, where it covers nothing."""
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 0.98),
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1.6,
        columnspacing=1.2,
    )


def _draw_distribution(
    axes: Axes, name: str, values_ms: list[float], percentiles: Percentiles, colour: str
) -> None:
    axes.set(title=name, xlabel="ms", ylabel="requests")
    if not values_ms:
        axes.text(0.5, 0.5, "nothing to measure", transform=axes.transAxes, ha="center")
        return
    unit, scale = ("s", 1e-3) if max(values_ms) >= 10_000 else ("ms", 1.0)
    values = [value * scale for value in values_ms]
    axes.hist(values, bins=min(40, max(8, len(values) // 3)), color=colour, alpha=0.75)
    for label, style in {"p50": "-", "p90": "--", "p99": ":"}.items():
        value = getattr(percentiles, label) * scale
        text = f"{label} {value:.4g}"
        axes.axvline(value, color="black", linestyle=style, linewidth=1.2, label=text)
    _legend_above(axes)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_concurrency(axes: Axes, exchanges: Sequence[Exchange], end_s: float) -> None:
    """Requests sent and not ended, exactly, at every moment that it changes."""
    changes = sorted(
        [(exchange.sent_s, 1) for exchange in exchanges]
        + [(exchange.end_s, -1) for exchange in exchanges]
    )
    times = [0.0, *(at_s for at_s, _ in changes), end_s]
    levels = np.cumsum([0, *(change for _, change in changes)])
    axes.stairs(levels, times, fill=True, color=_BLUE, alpha=0.3)
    axes.stairs(levels, times, color=_BLUE, linewidth=1.2)
    axes.set(title="Requests under way", xlabel="time (s)", ylabel="requests")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
