"""`octavo bench serve` against a server that says what it is told to."""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import time

import pytest
from support.fake_openai import FakeOpenAI, event, spoken

from octavo.bench import loads
from octavo.bench.client import api_root
from octavo.bench.serve import ServeOptions, arrival_times, parse_slo, run_serve
from octavo.bench.sse import EventParser
from octavo.cli import bench
from octavo.errors import ConfigError

SIX = loads.random_sizes(input_len=8, output_len=5, num_requests=6, seed=0)


def measure(server, load=SIX, **options):
    return run_serve(load, ServeOptions(base_url=server.url, **{"timeout_s": 10.0, **options}))


# ---- events


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_however_they_are_cut(size):
    text = (
        "\ufeff: comment\n\ndata: one\r\n\r\nevent: x\ndata:two\ndata: lines\n\n"
        "data:  é\r\rid: 1\n\ndata: unfinished\n"
    ).encode()[3:]
    parser = EventParser()
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    events = [data for chunk in chunks for data in parser.feed(chunk)]
    assert events == ["one", "two\nlines", " é"]


# ---- runs


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_run(endpoint):
    with FakeOpenAI(spoken) as server:
        run = measure(server, endpoint=endpoint, slo={"ttft": 10_000.0, "tpot": 10_000.0})
    report = run.report
    assert (report.figures.num_requests, report.num_failed, report.failures) == (6, 0, {})
    assert report.facts.model == "fake-model"
    assert report.figures.num_prompt_tokens == 6 * 8
    assert report.figures.num_output_tokens == 6 * 5
    assert report.figures.num_cached_tokens == 6
    assert report.num_counted_by_chunks == 0
    assert all(len(exchange.chunk_s) == 5 for exchange in run.exchanges)  # not the role's
    assert report.figures.ttft_ms.p50 <= report.e2e_ms.p50
    assert report.itl_ms.p99 > 0
    assert report.goodput == report.request_throughput > 0
    body = server.bodies[0]
    assert (body["stream"], body["ignore_eos"], body["temperature"]) == (True, True, 0.0)
    assert body["stream_options"] == {"include_usage": True}
    assert ("messages" in body) == (endpoint == "chat")
    assert report.prompt_kind == ("text" if endpoint == "chat" else "token_ids")


def test_token_ids_are_scaled_to_what_the_server_takes():
    with FakeOpenAI(spoken, vocab_size=32_000) as server:
        measure(server)
        prompts = [body["prompt"] for body in server.bodies]
        assert all(0 <= token_id < 32_000 for prompt in prompts for token_id in prompt)
        assert max(map(max, prompts)) > 9_999
        server.bodies.clear()
        measure(server, vocab_size=50)
        assert all(max(body["prompt"]) < 50 for body in server.bodies)


def test_a_server_that_takes_no_token_ids_gets_text():
    with FakeOpenAI(spoken, vocab_size=0) as server:
        report = measure(server).report
    assert (report.prompt_kind, report.num_failed) == ("text", 0)
    assert all(len(body["prompt"].split()) == 8 for body in server.bodies)


def test_chunks_count_where_there_is_no_usage():
    with FakeOpenAI(functools.partial(spoken, usage=False)) as server:
        report = measure(server).report
    assert report.num_counted_by_chunks == 6
    assert (report.figures.num_output_tokens, report.figures.num_prompt_tokens) == (30, 0)


def test_concurrency_is_limited():
    with FakeOpenAI(functools.partial(spoken, step_s=0.01)) as server:
        run = measure(server, max_concurrency=2)
    assert server.max_running <= 2
    # The clock of a request starts when it is sent, not when it was due.
    assert run.exchanges[-1].sent_s > run.exchanges[-1].scheduled_s + 0.05


def test_arrivals_are_a_seeded_poisson_process():
    times = arrival_times(2000, 50.0, seed=3)
    assert times == sorted(times) == arrival_times(2000, 50.0, seed=3) != arrival_times(2000, 50, 4)
    assert 2000 / times[-1] == pytest.approx(50.0, rel=0.1)
    assert arrival_times(3, math.inf, seed=3) == [0.0] * 3
    with FakeOpenAI(spoken) as server:
        run = measure(server, request_rate=60.0, seed=3)
    assert all(exchange.sent_s >= exchange.scheduled_s > 0 for exchange in run.exchanges)
    assert run.report.figures.seconds >= arrival_times(6, 60.0, seed=3)[-1]


def cut_off(body):
    yield event({"choices": [{"text": "a"}]})


def hangs(body):
    yield event({"choices": [{"text": "a"}]})
    time.sleep(0.8)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda body: (500, {"error": {"message": "it\nburns"}}), "HTTP 500: it burns"),
        (lambda body: (429, {"detail": "slow down"}), "HTTP 429: {'detail': 'slow down'}"),
        (cut_off, "the stream ended early"),
        (hangs, "no whole answer within 0.6 s"),
        (lambda body: [b"data: [DONE]\n\n"], "the answer was empty"),
        (lambda body: [b"data: {\n\n"], "malformed event: {"),
        (lambda body: [b"data: [1]\n\n"], "malformed event: [1]"),
        (lambda body: [event({"choices": [3]})], 'malformed event: {"choices": [3]}'),
        (lambda body: [event({"error": {"message": "boom"}})], "error event: boom"),
    ],
)
def test_failures_are_counted_by_cause(answer, cause):
    def answer_half(body):
        return answer(body) if len(server.bodies) % 2 else spoken(body, step_s=0.0)

    with FakeOpenAI(answer_half) as server:
        timeout_s, num = (0.6, 2) if answer is hangs else (10.0, 6)
        load = loads.random_sizes(input_len=8, output_len=5, num_requests=num, seed=0)
        report = measure(server, load, timeout_s=timeout_s, max_concurrency=1).report
    assert report.failures == {cause: num // 2}
    assert (report.num_failed, report.figures.num_requests) == (num // 2, num // 2)
    assert report.figures.num_output_tokens == 5 * num // 2


def test_refusals_are_counted_with_what_they_were_told():
    def answer_half(body):
        told = {"Retry-After": "7" if len(server.bodies) > 2 else "Wed, 21 Oct 2015 07:28:00 GMT"}
        return (429, {}, told) if len(server.bodies) % 2 else spoken(body, step_s=0.0)

    with FakeOpenAI(answer_half) as server:
        run = measure(server, max_concurrency=1)
    assert run.report.num_refused == run.report.num_failed == 3
    assert run.report.retry_after_s.p50 == 7
    assert [exchange.retry_after_s for exchange in run.exchanges] == [None, None, 7, None, 7, None]
    assert [exchange.status for exchange in run.exchanges] == [429, 200] * 3
    assert "3 refused, Retry-After p50 7 s" in run.report.summary()


def test_goodput_counts_those_that_met_every_limit():
    def slow_half(body):
        return spoken(body, step_s=0.15 if len(server.bodies) % 2 else 0.0)

    load = loads.random_sizes(input_len=8, output_len=2, num_requests=6, seed=0)
    with FakeOpenAI(slow_half) as server:
        report = measure(server, load, max_concurrency=1, slo={"tpot": 120.0}).report
    assert report.goodput == pytest.approx(report.request_throughput / 2, rel=0.01)


# ---- refused at the door


def test_a_load_too_long_for_the_model():
    with FakeOpenAI(spoken, max_model_len=12) as server:
        message = r"Request 1 of random 8\+5 takes 13 tokens.* max_model_len of fake-model is 12"
        with pytest.raises(ConfigError, match=message):
            measure(server)


def test_a_file_with_ids_beyond_the_vocabulary(tmp_path):
    path = tmp_path / "load.jsonl"
    path.write_text('{"prompt_token_ids": [5, 299], "max_tokens": 2}\n')
    with FakeOpenAI(spoken, vocab_size=300) as server:
        assert measure(server, loads.from_file(path)).report.num_failed == 0
        assert server.bodies[0]["prompt"] == [5, 299]
        server.vocab_size = 299
        with pytest.raises(ConfigError, match=r"load.jsonl has token id 299, beyond"):
            measure(server, loads.from_file(path))


def test_the_key_is_sent_and_a_wrong_one_is_refused():
    with FakeOpenAI(spoken, api_key="right") as server:
        assert measure(server, api_key="right").report.num_failed == 0
        with pytest.raises(ConfigError, match=r"refuses the API key: HTTP 401: wrong key"):
            measure(server, api_key="wrong")


def test_a_server_that_is_not_there():
    with FakeOpenAI(spoken) as server:
        pass
    with pytest.raises(ConfigError, match="Cannot reach"):
        measure(server)


@pytest.mark.parametrize("options", [{"num_prompts": 0}, {"request_rate": 0.0}, {"timeout_s": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="must be"):
        ServeOptions(base_url="http://localhost", **options)


def test_urls_and_limits_as_people_write_them():
    assert api_root("http://host:1/") == api_root("http://host:1/v1/") == "http://host:1/v1"
    for url in ("host:1", "", "http://[::1"):
        with pytest.raises(ConfigError, match="--base-url"):
            api_root(url)
    assert parse_slo("ttft:200,tpot:50.5") == {"ttft": 200.0, "tpot": 50.5}
    for text in ("ttft", "ttft:x", "itl:5", "ttft:-1", "ttft:200,", "ttft:nan"):
        with pytest.raises(ConfigError, match="is not NAME:MS"):
            parse_slo(text)


# ---- the command


def command(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(["serve", *map(str, arguments)]))


def test_the_command_writes_a_report(capsys, tmp_path):
    sizes = ["--input-len", 8, "--output-len", 4, "--num-prompts", 5, "--slo", "ttft:5000"]
    with FakeOpenAI(spoken) as server:
        assert command("--base-url", server.url, *sizes, "--output", tmp_path / "out") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["num_output_tokens"] == 20
    assert report["workload"] == "random 8+4"
    assert "5 requests in" in captured.err
    rows = [json.loads(x) for x in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(len(row["chunk_s"]) == 4 and row["ttft_ms"] > 0 for row in rows)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_which_everything_fails_still_reports(capsys, tmp_path):
    with FakeOpenAI(lambda body: (503, {"error": "busy"})) as server:
        flags = ["--base-url", server.url, "--num-prompts", 2, "--output", tmp_path / "out"]
        assert command(*flags) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["failures"] == {"HTTP 503: busy": 2}
    assert "2 x HTTP 503: busy" in captured.err
    assert (tmp_path / "out" / "report.png").is_file()


def test_flags_that_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude --workload"):
        command("--workload", "single", "--input-len", 5)


@pytest.mark.parametrize("missing", ["httpx", "matplotlib"])
def test_a_missing_extra_says_how_to_get_it(tmp_path, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from octavo.cli.main import main; "
        f"sys.exit(main(['bench', 'serve', '--output', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"needs the package '{missing}': pip install 'octavo[bench]'" in done.stderr


def test_the_client_needs_no_torch():
    code = "import sys, octavo.cli.bench, octavo.bench.plot, octavo.bench.serve; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
