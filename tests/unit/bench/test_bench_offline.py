"""`octavo bench offline` on a tiny model with random weights."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

import octavo
from octavo.bench import workloads
from octavo.bench.workloads import BenchRequest, random_ids
from octavo.cli import bench
from octavo.errors import ConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
KEYS = {
    "seconds",
    "output_tokens_per_s",
    "prompt_tokens_per_s",
    "startup_s",
    "ttft_ms",
    "tpot_ms",
    "peak_memory_bytes",
    "kv_capacity_tokens",
    "num_requests",
    "num_prompt_tokens",
    "num_output_tokens",
    "num_cached_tokens",
    "model",
    "device",
    "device_name",
    "dtype",
    "octavo_version",
    "workload",
    "repeats",
}


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def tiny_workload(monkeypatch):
    """`single`, but quick."""

    def make(rng):
        return [BenchRequest(random_ids(rng, 40), 6) for _ in range(3)]

    monkeypatch.setitem(workloads.WORKLOADS, "single", (make, 1))


def engine_flags(folder):
    flags = "--load-format dummy --device cpu --num-threads 1 --num-gpu-blocks-override 32"
    return ["--model", str(folder), *flags.split()]


def run(capsys, *arguments):
    """The JSON object in the last line on stdout, and what stood on stderr."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["offline", *map(str, arguments)])) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_a_workload(capsys, model_dir, tiny_workload, tmp_path):
    output = tmp_path / "report.json"
    arguments = ["--workload", "single", "--repeat", 2, "--output", output]
    report, summary = run(capsys, *engine_flags(model_dir), *arguments)
    assert set(report) == KEYS
    assert report == json.loads(output.read_text())
    sizes = [report[f"num_{name}"] for name in ("requests", "prompt_tokens", "output_tokens")]
    assert sizes == [3, 120, 18]
    assert report["num_cached_tokens"] == 0
    assert report["kv_capacity_tokens"] == 32 * 16
    assert report["model"] == str(model_dir)
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    assert report["octavo_version"] == octavo.__version__
    assert report["peak_memory_bytes"] > 50 << 20  # torch alone
    assert report["startup_s"] > 0
    assert 0 < report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"] <= report["seconds"] * 1e3
    assert report["output_tokens_per_s"] == pytest.approx(18 / report["seconds"], rel=1e-3)
    assert len(report["repeats"]) == 2
    assert "3 requests in" in summary
    assert "best of 2 repeats" in summary


def test_a_file_shares_prefixes_within_a_repeat_but_not_between_them(capsys, model_dir, tmp_path):
    path = tmp_path / "load.jsonl"
    line = json.dumps({"prompt_token_ids": list(range(100)), "max_tokens": 4})
    path.write_text(f"{line}\n{line}\n")
    flags = [*engine_flags(model_dir), "--max-num-seqs", "1", "--no-warmup"]
    report, _ = run(capsys, *flags, "--requests", path, "--repeat", 2)
    assert [repeat["num_cached_tokens"] for repeat in report["repeats"]] == [96, 96]
    assert report["workload"] == "load.jsonl"


@pytest.mark.parametrize(
    ("request_line", "message"),
    [
        ({"prompt_token_ids": [1] * 100, "max_tokens": 29}, "the model's context is 128 tokens"),
        ({"prompt_token_ids": [300], "max_tokens": 1}, "token id 300, but the vocabulary has"),
    ],
)
def test_a_request_that_does_not_fit_is_named(capsys, model_dir, tmp_path, request_line, message):
    path = tmp_path / "load.jsonl"
    good = {"prompt_token_ids": [1], "max_tokens": 1}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(request_line)}\n")
    with pytest.raises(ConfigError, match=r"Request 2 of load\.jsonl: ") as raised:
        run(capsys, *engine_flags(model_dir), "--requests", path)
    assert message in str(raised.value)


def test_a_bad_repeat_count(capsys, model_dir):
    with pytest.raises(ConfigError, match="--repeat must be at least 1"):
        run(capsys, *engine_flags(model_dir), "--workload", "single", "--repeat", 0)


@pytest.mark.slow
def test_it_runs_from_a_bare_checkout(model_dir, tmp_path):
    """Without the packages of the server and of the reports, as `python -m octavo`."""
    missing = ("msgspec", "gguf", "starlette", "uvicorn", "httpx", "matplotlib")
    path = tmp_path / "load.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2, 3], "max_tokens": 4}\n')
    arguments = ["octavo", "bench", "offline", *engine_flags(model_dir), "--requests", str(path)]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({missing!r})); "
        f"sys.argv = {arguments!r}; runpy.run_module('octavo', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == KEYS
    assert 0.5 < report["startup_s"] < 120  # of a process of its own: torch's import is in it
