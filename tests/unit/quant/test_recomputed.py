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


@pytest.fixture(params=["", "avx512", "avxvnni", "avx2"])
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
    with LLM(str(folder), quantization="int8", num_threads=2, **options) as llm:
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


@pytest.mark.slow
def test_preemption_and_chunks_change_nothing(folder, monkeypatch):
    expected = [answers(folder, [prompt])[0] for prompt in PROMPTS]
    assert answers(folder, PROMPTS) == expected
    preempted = []
    preempt = Request.preempt
    monkeypatch.setattr(
        Request,
        "preempt",
        lambda self, ids: (preempted.append(len(ids) - self.prompt_len), preempt(self, ids)),
    )
    small = {"max_num_seqs": 6, "max_num_batched_tokens": 24}
    got = answers(folder, PROMPTS, num_gpu_blocks_override=14, **small)
    assert got == expected
    assert max(preempted) > 0  # generated tokens were computed again


def test_a_prompt_found_in_the_cache_has_the_same_bits(folder):
    """Both prompts begin with what was a prompt before: two blocks of it."""
    head = PROMPTS[-1][:32]
    prompts = [[*head, 5, 6, 7], [*head, 9], [*head, *PROMPTS[2]]]
    expected = [answers(folder, [prompt])[0] for prompt in prompts]
    assert answers(folder, prompts, enable_prefix_caching=True, max_num_seqs=1) == expected


def test_prompts_take_the_tiles(folder):
    """Where there are any: the engine knows which rows are a prompt's."""
    if library.isa() != "amx":
        pytest.skip("this CPU has none")

    def prompt_logprobs() -> list[object]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        with LLM(str(folder), quantization="int8", num_threads=1) as llm:
            return llm.generate(PROMPTS[-1:], params, use_tqdm=False)[0].prompt_logprobs[1:]

    in_tiles = prompt_logprobs()
    library.use_isa("avx512")
    in_8_bits = prompt_logprobs()
    assert len(in_tiles) == len(in_8_bits) == len(PROMPTS[-1]) - 1
    assert all(a != b for a, b in zip(in_tiles, in_8_bits, strict=True))
