"""Every architecture on a GPU, with its kernels and graphs, against the CPU in plain torch."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.small_engines import (
    FAMILIES,
    QWEN3,
    asking,
    prompt_logprobs,
    requests,
    run,
    write_model,
)

pytestmark = pytest.mark.gpu

ON_CPU = {"dtype": "float32", "device": "cpu", "attention_backend": "torch"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("family") / "model", QWEN3 | FAMILIES[request.param])


def test_greedy_tokens_are_those_of_the_cpu(model: Path) -> None:
    """In float32, where a choice between near equals is rare."""
    work = requests(24, seed=8, plain=True)
    on_cpu = run(model, work, load_format="auto", **ON_CPU)
    for options in ({}, {"enforce_eager": True}, {"attention_backend": "torch"}):
        on_gpu = run(model, work, load_format="auto", device="cuda", **options)
        equal = [on_cpu[i] == on_gpu[i] for i in on_cpu]
        assert sum(equal) >= len(equal) - 1, f"{options}: {sum(equal)} of {len(equal)}"


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_position_counts(model: Path, backend: str) -> None:
    """Prompts alone in a step, whose last queries are alone in a tile, and others."""
    lens = (65, 129, 193, 256, 40)
    work = asking(
        [
            dataclasses.replace(
                request, prompt_token_ids=(request.prompt_token_ids * length)[:length]
            )
            for request, length in zip(requests(5, seed=10, plain=True), lens, strict=True)
        ]
    )
    on_cpu = prompt_logprobs(model, work, max_num_seqs=1, **ON_CPU)
    on_gpu = prompt_logprobs(
        model, work, max_num_seqs=1, dtype="float32", device="cuda", attention_backend=backend
    )
    assert (on_cpu - on_gpu).abs().max() < 2e-3 * on_cpu.std()


def test_half_precision_is_near_the_cpu(model: Path) -> None:
    work = asking(requests(12, seed=9, plain=True))
    on_cpu = prompt_logprobs(model, work, **ON_CPU)
    for dtype, most in (("bfloat16", 0.03), ("float16", 0.004)):
        on_gpu = prompt_logprobs(model, work, dtype=dtype, device="cuda")
        mean = (on_cpu - on_gpu).abs().mean() / on_cpu.std()
        print(f"{dtype}: {mean:.1e} of the spread {on_cpu.std():.2f}")
        assert mean < most


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs octavo[flashinfer]")
@pytest.mark.parametrize("model", ["mistral", "gemma2", "gemma3"], indirect=True)
def test_flashinfer_attends_as_the_cpu_does(model: Path) -> None:
    """Windows, softcaps and heads of 256."""
    work = asking(requests(12, seed=9, plain=True))
    on_cpu = prompt_logprobs(model, work, **ON_CPU)
    options = {"dtype": "float16", "device": "cuda", "attention_backend": "flashinfer"}
    on_gpu = prompt_logprobs(model, work, **options)
    assert json.loads((model / "config.json").read_text())["sliding_window"]
    assert (on_cpu - on_gpu).abs().mean() < 0.004 * on_cpu.std()
