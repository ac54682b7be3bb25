"""What is computed again has the bits that it had: prompts as prompts, the rest as the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_folder import write_tiny_folder

from octavo import LLM, SamplingParams
from octavo.kernels.cpu import library
from octavo.models import create_model
from octavo.sched.request import Request

pytestmark = pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler")

PROMPTS = [[(7 * i + 3 * n) % 500 for i in range(n)] for n in (1, 5, 16, 23, 30, 41)]
PARAMS = SamplingParams(temperature=0, max_tokens=40, logprobs=1, ignore_eos=True)


@pytest.fixture(params=["", "avx512", "avx2"])
def folder(tmp_path, monkeypatch, request):
    """A checkpoint whose layers are a stack."""
    if not library.use_isa(request.param):
        pytest.skip("this CPU lacks it")
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    folder = write_tiny_folder(tmp_path / "model", hidden_size=128, intermediate_size=160)
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    slots = create_model(config, 64).weight_slots()
    save_file(
        {name: torch.randn(slot.shape) / 8 for name, slot in slots.items()},
        folder / "model.safetensors",
    )
    yield folder
    library.use_isa("")


def answers(folder: Path, prompts: list[list[int]], **options: object) -> list[object]:
    options = {"num_gpu_blocks_override": 64, "enable_prefix_caching": False} | options
    with LLM(str(folder), quantization="int8", num_threads=1, **options) as llm:
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


def test_preemption_and_chunks_change_nothing(folder, monkeypatch):
    expected = [answers(folder, [prompt])[0] for prompt in PROMPTS]
    assert answers(folder, PROMPTS) == expected
    preempted = []
    preempt = Request.preempt
    monkeypatch.setattr(
        Request, "preempt", lambda self, ids: (preempted.append(len(ids)), preempt(self, ids))
    )
    small = {"max_num_seqs": 6, "max_num_batched_tokens": 24}
    got = answers(folder, PROMPTS, num_gpu_blocks_override=14, **small)
    assert got == expected
    assert preempted
