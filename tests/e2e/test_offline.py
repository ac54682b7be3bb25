"""The offline API on the real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, EngineError, InvalidRequestError

pytestmark = pytest.mark.slow

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a fox who",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\n",
    "The three laws of thermodynamics are",
    "import numpy as np\n\nx = np.",
    "Water boils at",
    "La capitale de la France est",
    "Q: What is 7 times 8?\nA:",
    "In 1969, the first humans",
    "The recipe needs two eggs, a cup of",
    "<html>\n<body>\n<h1>",
    "To be, or not to be,",
    "Photosynthesis is the process by which",
    "SELECT name, age FROM users WHERE",
    "The stock market fell today because",
    "Roses are red,\nviolets are blue,\n",
    "A prime number is a number that",
    "The meeting is on Monday at",
    "Once upon a time there was a fox who lived in a forest with a bear and",
    "🙂 means",
]


@pytest.fixture(scope="module")
def llm(smollm2_dir: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_dir), dtype="float32", max_num_batched_tokens=64) as llm:
        yield llm


def test_64_greedy_tokens_are_those_of_transformers(llm: LLM, smollm2_dir: Path) -> None:
    """Teacher-forced: each of our tokens must be transformers' first choice after those before it,
    which makes the whole greedy continuation the same.
    """
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    assert len(PROMPTS) >= 20
    for output in outputs:
        prompt, ours = output.prompt_token_ids, output.outputs[0].token_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + ours])).logits[0]
        theirs = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert ours == theirs, output.prompt
        assert len(ours) == 64


def test_outputs_come_in_order_whatever_the_lengths(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=1 + (i * 7) % 11) for i in range(12)]
    outputs = llm.generate(PROMPTS[:12], params, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS[:12]
    for output, param in zip(outputs, params, strict=True):
        [alone] = llm.generate(output.prompt, param, use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_n_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=1, temperature=1)
    [output] = llm.generate({"prompt": "The sea is"}, params, use_tqdm=False)
    assert len({choice.text for choice in output.outputs}) > 1
    for choice in output.outputs:
        assert len(choice.logprobs) == len(choice.token_ids)
        total = sum(
            entry[t].logprob for entry, t in zip(choice.logprobs, choice.token_ids, strict=True)
        )
        assert choice.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    [again] = llm.generate([output.prompt_token_ids], params, use_tqdm=False)
    assert [c.text for c in again.outputs] == [c.text for c in output.outputs]


def test_prompt_logprobs_are_those_of_transformers(llm: LLM, smollm2_dir: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20  # several chunks
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    [output] = llm.generate(text, params, use_tqdm=False)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = output.prompt_token_ids
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    for position in range(1, len(ids)):
        ours = output.prompt_logprobs[position][ids[position]].logprob
        assert ours == pytest.approx(float(expected[position - 1, ids[position]]), abs=2e-4)


def test_chat_and_streaming_agree(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    [output] = llm.chat(messages, params, use_tqdm=False)
    assert output.outputs[0].text == "The capital of Japan is Tokyo."
    pieces = [delta.text for delta in llm.stream(llm.chat_prompt(messages), params)]
    assert "".join(pieces) == output.outputs[0].text
    assert len(pieces) > 3


def test_a_stream_that_is_dropped_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream("Once upon", SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm._engine().has_work
    llm._engine().check_integrity()


def test_bad_requests_leave_the_engine_alone(llm: LLM) -> None:
    for prompt in (
        "",
        [10**6],
        {"text": "x"},
        {"prompt": "x", "prompt_token_ids": [1]},
        [5] * 9000,
    ):
        with pytest.raises(InvalidRequestError):
            llm.generate([PROMPTS[0], prompt], use_tqdm=False)
    assert not llm._engine().has_work


def test_options_are_checked(smollm2_dir: Path) -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(str(smollm2_dir), max_modl_len=10)
    with pytest.raises(ConfigError, match="8192"):
        LLM(str(smollm2_dir), max_model_len=100_000)
    with pytest.raises(ConfigError, match="room for 160"):
        LLM(str(smollm2_dir), max_model_len=4096, num_gpu_blocks_override=10)
    with LLM(str(smollm2_dir)) as llm:
        pass
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x")
