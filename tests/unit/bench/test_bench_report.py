"""The figures that both kinds of run share."""

from __future__ import annotations

import random

import numpy as np
import pytest

from octavo.bench.report import (
    Facts,
    Figures,
    OfflineReport,
    Percentiles,
    Timing,
    check_output,
    percentile,
)
from octavo.errors import ConfigError


def timing(first_s, last_s, num_output_tokens=5, start_s=0.0):
    return Timing(
        num_prompt_tokens=10,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=2,
        start_s=start_s,
        first_token_s=first_s,
        last_token_s=last_s,
    )


@pytest.mark.parametrize("num_values", [1, 2, 3, 10, 137])
def test_percentiles_are_numpys(num_values):
    rng = random.Random(num_values)
    values = sorted(rng.lognormvariate(3, 1) for _ in range(num_values))
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(np.percentile(values, share * 100))


def test_percentiles_of_what_could_not_be_measured():
    assert Percentiles.of([]) == Percentiles.of([None]) == Percentiles(None, None, None)
    assert Percentiles.of([None, 2.0, 1.0]) == Percentiles(1.5, 1.9, 1.99)


def test_latencies_of_a_request():
    one = timing(first_s=1.5, last_s=3.5, start_s=1.0)
    assert (one.ttft_ms, one.tpot_ms, one.e2e_ms) == (500.0, 500.0, 2500.0)
    assert timing(1.0, 1.0, num_output_tokens=1).tpot_ms is None


def test_figures_of_a_run():
    figures = Figures.of([timing(1.0, 2.0), timing(2.0, 4.0)], seconds=4.0)
    assert figures.output_tokens_per_s == 2.5
    assert figures.prompt_tokens_per_s == 5.0
    assert (figures.num_requests, figures.num_cached_tokens) == (2, 4)
    assert figures.ttft_ms == Percentiles(1500.0, 1900.0, 1990.0)
    assert figures.tpot_ms.p50 == 375.0
    nothing = Figures.of([], seconds=0.0)
    assert (nothing.output_tokens_per_s, nothing.num_requests) == (0.0, 0)


def test_the_best_repeat_is_reported_and_all_of_them():
    slow, fast = (Figures.of([timing(0.5, s)], seconds=s) for s in (2.0, 1.0))
    facts = Facts(
        workload="single",
        model="m",
        octavo_version="1",
        device="cpu",
        device_name="a CPU",
        dtype="float32",
        startup_s=1.0,
        peak_memory_bytes=2**30,
        kv_capacity_tokens=4096,
    )
    report = OfflineReport(facts=facts, repeats=(slow, fast, slow))
    content = report.as_json()
    assert content["seconds"] == 1.0
    assert [repeat["seconds"] for repeat in content["repeats"]] == [2.0, 1.0, 2.0]
    assert content["kv_capacity_tokens"] == 4096
    assert "the best of 3 repeats, which took 2.00, 1.00, 2.00 s" in report.summary()


def test_an_unusable_output_shows_before_the_run(tmp_path):
    path = tmp_path / "report.json"
    check_output(path, is_folder=False)
    check_output(tmp_path, is_folder=True)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_output(tmp_path / "missing" / "report.json", is_folder=False)
    path.write_text("{}")
    check_output(path, is_folder=False)
    with pytest.raises(ConfigError, match="exists and is no folder"):
        check_output(path, is_folder=True)
    with pytest.raises(ConfigError, match="exists and is no file"):
        check_output(tmp_path, is_folder=False)
