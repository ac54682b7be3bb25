"""The engine on a GPU: against the CPU, against itself without graphs, overlap or cache.

Random weights in float32, where GPU and CPU agree to rounding and greedy choices are the same.
"""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.small_engines import QWEN3, asking, prompt_logprobs, requests, run, write_model

from octavo.checkpoint import locate
from octavo.config import EngineArgs
from octavo.engine.build import build_core

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights are drawn when it is loaded, so only by `run`'s engines on one device."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(QWEN3))
    return folder


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 1, "max_num_batched_tokens": 77},
        {"num_gpu_blocks_override": 140},  # preempts
        {"attention_backend": "torch"},
        {"embedding_on_host": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_run_gives_the_same_tokens(
    folder: Path, options: dict[str, object], plain: bool
) -> None:
    work = requests(40, seed=1, plain=plain)
    assert run(folder, work, **options) == run(folder, work)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("shared") / "model", QWEN3)


def test_greedy_tokens_are_those_of_the_cpu(shared: Path) -> None:
    work = requests(20, seed=2, plain=True)
    options = {"load_format": "auto", "max_num_seqs": 16}
    on_cpu = run(shared, work, device="cpu", attention_backend="torch", **options)
    assert on_cpu == run(shared, work, device="cuda", **options)


@pytest.mark.parametrize(
    ("dtype", "mean", "most"), [("bfloat16", 6e-3, 0.05), ("float16", 1e-3, 0.01)]
)
def test_half_precision_is_near_the_cpu(shared: Path, dtype: str, mean: float, most: float) -> None:
    """Log-probabilities of some 3,000 prompt tokens, which spread by 0.46: against float32 on a CPU
    in plain torch, in chunks, with decodes between them.
    """
    work = asking(requests(24, seed=3, plain=True))
    on_cpu = prompt_logprobs(shared, work, dtype="float32", device="cpu", attention_backend="torch")
    on_gpu = prompt_logprobs(shared, work, dtype=dtype, device="cuda")
    assert len(on_cpu) == len(on_gpu) == sum(len(r.prompt_token_ids) - 1 for r in work)
    difference = (on_cpu - on_gpu).abs()
    print(f"{dtype}: mean {difference.mean():.2e}, most {difference.max():.2e}, {len(on_cpu)}")
    assert difference.mean() < mean
    assert difference.max() < most


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_graphs_equal_eager(folder: Path, dtype: str) -> None:
    """The same kernels on the same shapes but for padding: tokens agree almost everywhere."""
    work = requests(24, seed=4, plain=True)
    graphs = run(folder, work, dtype=dtype)
    eager = run(folder, work, dtype=dtype, enforce_eager=True)
    pairs = [(a, b) for i in graphs for a, b in zip(graphs[i], eager[i], strict=False)]
    assert sum(a == b for a, b in pairs) / len(pairs) > 0.8


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs octavo[flashinfer]")
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"num_gpu_blocks_override": 140}])
def test_flashinfer_chooses_as_triton_does(folder: Path, options: dict[str, object]) -> None:
    """In 16 bits, which is all that FlashInfer has: after a tie that falls otherwise, a request
    goes its own way.
    """
    work = requests(40, seed=7, plain=True)
    triton = run(folder, work, dtype="float16", **options)
    ours = run(folder, work, dtype="float16", attention_backend="flashinfer", **options)
    first = [triton[i][0] == ours[i][0] for i in triton]
    assert sum(first) / len(first) > 0.9
    pairs = [(a, b) for i in triton for a, b in zip(triton[i], ours[i], strict=False)]
    assert sum(a == b for a, b in pairs) / len(pairs) > 0.7


def test_seeds_reproduce(folder: Path) -> None:
    work = requests(30, seed=5, plain=False)
    assert run(folder, work) == run(folder, work)


def test_a_thousand_mixed_requests_with_aborts(folder: Path) -> None:
    args = EngineArgs.from_options(
        model=str(folder), load_format="dummy", max_num_seqs=64, max_num_batched_tokens=512
    )
    core = build_core(args, locate(str(folder), load_format="dummy"))
    rng = random.Random(0)
    work = requests(1000, seed=6, plain=False)
    finished: list[int] = []
    while work or core.has_work:
        for request in work[:20]:
            core.add(request)
        del work[:20]
        for _ in range(5):
            if (outputs := core.step()) is not None:
                finished += [finish.request_id for finish in outputs.finished]
        victims = [rng.randrange(1, 1001) for _ in range(2)]
        finished += [finish.request_id for finish in core.abort(victims).finished]
    core.check_integrity()
    core.close()
    assert sorted(finished) == list(range(1, 1001))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}])
def test_the_second_gpu_will_do(folder: Path, options: dict[str, object]) -> None:
    work = requests(20, seed=8, plain=False)
    assert run(folder, work, device="cuda:1", **options) == run(folder, work, device="cuda:0")
    assert torch.cuda.current_device() == 0
