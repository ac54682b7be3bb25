"""The real model in its default, quantised form against float32: perplexity and choices."""

from __future__ import annotations

import math
import pydoc_data.topics

import pytest

from octavo.kernels.cpu import library
from octavo.llm import LLM
from octavo.types import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler"),
]

TOPICS = ("comparisons", "exceptions", "class", "naming", "objects", "import")  # English prose
NUM_PROMPTS, PROMPT_LEN, NUM_POSITIONS = 20, 20, 200


def score(llm: LLM, sequences: list[list[int]]) -> list[list[tuple[float, int]]]:
    """For every token after the first: its log-probability, and what was likeliest there."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    found = []
    for output in llm.generate(sequences, params, use_tqdm=False):
        entries = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append(
            [(ps[t].logprob, max(ps, key=lambda i, ps=ps: ps[i].logprob)) for t, ps in entries]
        )
    return found


def perplexity(scores: list[list[tuple[float, int]]]) -> float:
    values = [logprob for sequence in scores for logprob, _ in sequence]
    return math.exp(-sum(values) / len(values))


@pytest.fixture
def best_isa_again():
    yield
    library.use_isa("")


def test_quality_of_the_default(smollm2_dir, best_isa_again):
    with LLM("smollm2-135m", quantization="none") as llm:
        text = "\n".join(pydoc_data.topics.topics[topic] for topic in TOPICS)
        ids = llm._tokenizer.encode(text)[:4000]
        texts = [ids[i : i + 250] for i in range(0, len(ids), 250)]
        prompts = [ids[i * 180 : i * 180 + PROMPT_LEN] for i in range(NUM_PROMPTS)]
        params = SamplingParams(temperature=0, max_tokens=NUM_POSITIONS, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        expected = perplexity(score(llm, texts))
    forced = [o.prompt_token_ids + o.outputs[0].token_ids for o in outputs]
    for name in ("avx2", "avx512", "amx") if library.isa() == "amx" else ("",):
        assert library.use_isa(name)
        with LLM("smollm2-135m", quantization="int8") as llm:
            assert abs(perplexity(score(llm, texts)) / expected - 1) < 0.01
            agreed = sum(
                likeliest == sequence[i + 1]
                for sequence, scores in zip(forced, score(llm, forced), strict=True)
                for i, (_, likeliest) in enumerate(scores)
                if i >= PROMPT_LEN - 1
            )
        assert agreed / (NUM_PROMPTS * NUM_POSITIONS) > 0.95


def test_text_does_not_depend_on_the_batch(smollm2_dir):
    """Greedy tokens and their log-probabilities, to the bit, alone and among others."""
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=1, ignore_eos=True)
    prompts = [f"{i} is a number. " * (1 + i % 7) + "Once upon a time" for i in range(24)]
    with LLM("smollm2-135m", quantization="int8", enable_prefix_caching=False) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        for i in (0, 13, 23):
            alone = llm.generate([prompts[i]], params, use_tqdm=False)[0]
            assert alone.outputs[0].token_ids == together[i].outputs[0].token_ids
            assert alone.outputs[0].logprobs == together[i].outputs[0].logprobs
