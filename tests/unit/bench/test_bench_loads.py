"""Workloads stay the same for ever, files of requests are checked line by line."""

from __future__ import annotations

import hashlib
import json

import pytest

from octavo.bench import loads
from octavo.bench.workloads import HIGH_ID, WORKLOADS, BenchRequest, make_workload, scale_ids
from octavo.errors import ConfigError

# Of json.dumps([[prompt_token_ids, max_tokens], ...]).
GOLDEN = {
    "single": "0a0329ba4acdabc7",
    "mixed256": "bd596f409ebf829f",
    "prefill": "c48b48d262f2199e",
    "shared_prefix": "e55050f7775462de",
    "chat1000": "1db10b973dfb7a52",
    "long_decode": "42564295cee6c106",
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_on_every_machine(name):
    content = [[list(r.prompt_token_ids), r.max_tokens] for r in make_workload(name)]
    assert hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16] == GOLDEN[name]


def test_repeats_differ_and_can_be_repeated():
    first, second = make_workload("single"), make_workload("single", repeat=1)
    assert first != second
    assert second == make_workload("single", repeat=1)
    assert [len(r.prompt_token_ids) for r in second] == [512]


def test_ids_are_scaled_into_a_small_vocabulary():
    request = BenchRequest((0, 100, 75_000, HIGH_ID), 4)
    assert scale_ids(request, HIGH_ID + 1) is request
    assert scale_ids(request, 151_936) is request
    assert scale_ids(request, 300) == BenchRequest((0, 0, 149, 299), 4)
    shared = loads.workload("shared_prefix").requests(vocab_size=500)
    assert max(max(r.prompt_token_ids) for r in shared) < 500
    assert len({r.prompt_token_ids[:2048] for r in shared}) == 1
    assert len({r.prompt_token_ids for r in shared}) == 256


def test_taking_more_than_a_workload_has_goes_on_with_its_repeats():
    load = loads.workload("single")
    assert load.take(None) == load.requests(0)
    assert load.take(3) == load.requests(0) + load.requests(1) + load.requests(2)
    sizes = loads.random_sizes(5, 7, num_requests=2, seed=1).take(3)
    assert [(len(r.prompt_token_ids), r.max_tokens) for r in sizes] == [(5, 7)] * 3
    assert len(set(sizes)) == 3


def test_requests_from_a_file(tmp_path):
    path = tmp_path / "load.jsonl"
    path.write_text('{"prompt_token_ids": [1, 149999], "max_tokens": 2}\n{"max_tokens": 1, ')
    with path.open("a") as file:
        file.write('"prompt_token_ids": [7]}\n')
    load = loads.from_file(path)
    assert load.name == "load.jsonl"
    # Taken as they are: never scaled, the same for each repeat.
    wanted = [BenchRequest((1, 149999), 2), BenchRequest((7,), 1)]
    assert load.requests(vocab_size=10) == load.requests(1) == wanted
    assert load.take(1) == wanted[:1]
    with pytest.raises(ConfigError, match="has 2 requests, not 3"):
        load.take(3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2 must be an object with exactly max_tokens and prompt_token_ids"),
        ('{"prompt_token_ids": [1]}', "line 2 must be an object with exactly"),
        ('{"prompt_token_ids": [1], "max_tokens": 1, "n": 2}', "line 2 must be an object"),
        ('{"prompt_token_ids": [], "max_tokens": 1}', "line 2: prompt_token_ids must be"),
        ('{"prompt_token_ids": [1, -1], "max_tokens": 1}', "line 2: prompt_token_ids must be"),
        ('{"prompt_token_ids": [1.0], "max_tokens": 1}', "line 2: prompt_token_ids must be"),
        ('{"prompt_token_ids": [true], "max_tokens": 1}', "line 2: prompt_token_ids must be"),
        ('{"prompt_token_ids": "hi", "max_tokens": 1}', "line 2: prompt_token_ids must be"),
        ('{"prompt_token_ids": [1], "max_tokens": 0}', "line 2: max_tokens must be"),
        ('{"prompt_token_ids": [1], "max_tokens": "4"}', "line 2: max_tokens must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "load.jsonl"
    path.write_text(f'{{"prompt_token_ids": [1], "max_tokens": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        loads.from_file(path)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="Cannot read the requests file"):
        loads.from_file(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        loads.from_file(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="Cannot read the requests file"):
        loads.from_file(tmp_path / "binary.jsonl")
