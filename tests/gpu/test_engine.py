"""The engine on a GPU: against the CPU, against itself without graphs, overlap or cache.

Random weights in float32, where GPU and CPU agree to rounding and greedy choices are the same.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from octavo.checkpoint import locate
from octavo.config import EngineArgs
from octavo.engine.build import build_core
from octavo.types import EngineRequest, SamplingParams

pytestmark = pytest.mark.gpu

VOCAB = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def requests(count: int, seed: int, *, plain: bool) -> list[EngineRequest]:
    rng = random.Random(seed)
    head = [rng.randrange(3, VOCAB) for _ in range(200)]
    made = []
    for i in range(count):
        own = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 150))]
        prompt = tuple(head[: rng.choice([0, 0, 64, 130, 200])] + own)
        params = SamplingParams(max_tokens=None, temperature=0)
        if not plain:
            params = SamplingParams(
                max_tokens=None,
                temperature=rng.choice([0, 0.7, 1.2]),
                top_k=rng.choice([0, 30]),
                top_p=rng.choice([1.0, 0.9]),
                min_p=rng.choice([0.0, 0.05]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                logprobs=rng.choice([None, 2]),
            )
        made.append(
            EngineRequest(
                request_id=i + 1,
                prompt_token_ids=prompt,
                params=params,
                max_total_len=len(prompt) + rng.randrange(1, 80),
                stop_token_ids=(2,),
                seed=i,
            )
        )
    return made


def drive(args: EngineArgs, work: Sequence[EngineRequest]) -> dict[int, list[int]]:
    """The tokens of each request, from an engine of its own."""
    core = build_core(args, locate(args.model, load_format=args.load_format))
    tokens: dict[int, list[int]] = {request.request_id: [] for request in work}
    for request in work:
        core.add(request)
    while core.has_work:
        if (outputs := core.step()) is not None:
            for request_id, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
                tokens[request_id].append(token)
    core.check_integrity()
    core.close()
    return tokens


def run(folder: Path, work: Sequence[EngineRequest], **options: object) -> dict[int, list[int]]:
    settings = {
        "dtype": "float32",
        "load_format": "dummy",
        "max_num_batched_tokens": 256,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 1 << 28,
    }
    return drive(EngineArgs.from_options(model=str(folder), **settings | options), work)


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
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_run_gives_the_same_tokens(
    folder: Path, options: dict[str, object], plain: bool
) -> None:
    work = requests(40, seed=1, plain=plain)
    assert run(folder, work, **options) == run(folder, work)


@pytest.fixture(scope="module")
def shared(folder: Path) -> Path:
    """With weights in a file: each device draws its own by its own generator."""
    from safetensors.torch import save_file

    from octavo.models import create_model

    hf_config = json.loads((folder / "config.json").read_text())
    model = create_model(hf_config, 2048)
    state = {}
    for name, slot in model.weight_slots().items():
        state[name] = torch.empty(slot.shape).uniform_(-0.05, 0.05)
        if "norm" in name:
            state[name].fill_(1.0)
    shared = folder / "shared"
    shared.mkdir(exist_ok=True)
    save_file(state, shared / "model.safetensors")
    (shared / "config.json").write_text(json.dumps(hf_config))
    return shared


def test_greedy_tokens_are_those_of_the_cpu(shared: Path) -> None:
    work = requests(20, seed=2, plain=True)
    options = {"load_format": "auto", "max_num_seqs": 16}
    on_cpu = run(shared, work, device="cpu", attention_backend="torch", **options)
    assert on_cpu == run(shared, work, device="cuda", **options)


def prompt_logprobs(folder: Path, work: Sequence[EngineRequest], **options: object) -> torch.Tensor:
    """Of every prompt token, request by request."""
    args = EngineArgs.from_options(
        model=str(folder), max_num_seqs=16, max_num_batched_tokens=256, **options
    )
    core = build_core(args, locate(str(folder)))
    found: dict[int, list[float]] = {request.request_id: [] for request in work}
    for request in work:
        core.add(request)
    while core.has_work:
        if (outputs := core.step()) is not None:
            for request_id, positions in outputs.prompt_logprobs.items():
                found[request_id] += [position.logprobs[0] for position in positions]
    core.close()
    return torch.tensor([value for values in found.values() for value in values])


@pytest.mark.parametrize(
    ("dtype", "mean", "most"), [("bfloat16", 6e-3, 0.05), ("float16", 1e-3, 0.01)]
)
def test_half_precision_is_near_the_cpu(shared: Path, dtype: str, mean: float, most: float) -> None:
    """Log-probabilities of some 3,000 prompt tokens, which spread by 0.46: against float32 on a CPU
    in plain torch, in chunks, with decodes between them.
    """
    work = [
        dataclasses.replace(
            request,
            params=SamplingParams(max_tokens=None, temperature=0, prompt_logprobs=0),
            max_total_len=len(request.prompt_token_ids) + 5,
        )
        for request in requests(24, seed=3, plain=True)
    ]
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
