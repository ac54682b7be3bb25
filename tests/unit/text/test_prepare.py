from __future__ import annotations

import itertools

import pytest

from octavo.errors import CapacityError, ContextLengthError, InvalidRequestError
from octavo.text.prepare import Limits, check_request, prepare_requests
from octavo.types import EngineInfo, SamplingParams

LIMITS = Limits(
    max_model_len=100, vocab_size=50, kv_capacity_tokens=64, eos_token_ids=(1, 2), block_size=16
)
ROOMY = Limits(
    max_model_len=100, vocab_size=50, kv_capacity_tokens=999, eos_token_ids=(1, 2), block_size=16
)


def prepare(params, limits=ROOMY, tokenizer=None, prompt=(5, 6, 7), **options):
    ids = itertools.count(10)
    return prepare_requests(
        prompt, params, limits, tokenizer, next_id=lambda: next(ids), arrival_s=1.5, **options
    )


def test_limits_from_info():
    info = EngineInfo(
        model="m",
        architecture="a",
        dtype="float32",
        device="cpu",
        max_model_len=100,
        vocab_size=50,
        eos_token_ids=(1, 2),
        kv_cache_dtype="float32",
        block_size=16,
        num_blocks=5,
        kv_capacity_tokens=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        enable_prefix_caching=True,
    )
    assert Limits.from_info(info) == LIMITS


def test_children_have_their_own_ids_and_seeds():
    first, second, third = prepare(SamplingParams(n=3, seed=7), priority=4, cache_salt="s")
    assert [r.request_id for r in (first, second, third)] == [10, 11, 12]
    assert [r.seed for r in (first, second, third)] == [7, 8, 9]
    assert (first.priority, first.cache_salt, first.arrival_s) == (4, "s", 1.5)
    assert first.prompt_token_ids == (5, 6, 7)
    assert first.max_total_len == 3 + 16


def test_seeds():
    drawn = {r.seed for r in prepare(SamplingParams(n=20))}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**63 for seed in drawn)
    assert prepare(SamplingParams(), default_seed=3)[0].seed == 3
    assert prepare(SamplingParams(seed=0), default_seed=3)[0].seed == 0
    assert 0 <= prepare(SamplingParams(seed=-1))[0].seed < 2**63
    assert 0 <= prepare(SamplingParams(seed=2**63 - 1, n=2))[1].seed < 2**63


def test_stop_tokens():
    params = SamplingParams(stop_token_ids=[9, 1])
    assert prepare(params)[0].stop_token_ids == (1, 2, 9)
    assert prepare(params.replace(ignore_eos=True))[0].stop_token_ids == (9, 1)


def test_bad_words(byte_level, sentencepiece):
    params = SamplingParams(bad_words=["hello", " hello"])
    for tokenizer in (byte_level, sentencepiece):
        limits = Limits(
            max_model_len=100,
            vocab_size=tokenizer.vocab_size,
            kv_capacity_tokens=999,
            eos_token_ids=(),
            block_size=16,
        )
        (request,) = prepare(params, limits, tokenizer)
        texts = {tokenizer.decode(ids).strip() for ids in request.bad_words_token_ids}
        assert texts == {"hello"}
        assert len(request.bad_words_token_ids) == 2
    with pytest.raises(InvalidRequestError, match="blank"):
        prepare(SamplingParams(bad_words=["  "]), ROOMY, byte_level)


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ((), {}, "prompt"),
        ((50,), {}, "prompt"),
        ((-1,), {}, "prompt"),
        ((True,), {}, "prompt"),
        ((5,), {"stop_token_ids": [50]}, "stop_token_ids"),
        ((5,), {"allowed_token_ids": [3, 99]}, "allowed_token_ids"),
        ((5,), {"logit_bias": {77: 1.0}}, "logit_bias"),
        ((5,), {"stop": "x"}, "stop"),
        ((5,), {"bad_words": ["x"]}, "bad_words"),
    ],
)
def test_refused(prompt, params, param):
    with pytest.raises(InvalidRequestError) as caught:
        prepare(SamplingParams(**params), prompt=prompt)
    assert caught.value.param == param


def test_stop_strings_are_limited_together(byte_level):
    with pytest.raises(InvalidRequestError, match="16384"):
        prepare(SamplingParams(stop=["x" * 9000, "y" * 9000]), ROOMY, byte_level)


def test_context_length():
    with pytest.raises(ContextLengthError, match=r"100 tokens.*100 tokens"):
        check_request([5] * 100, SamplingParams(), ROOMY)
    with pytest.raises(ContextLengthError, match=r"90 tokens and max_tokens is 11.*100"):
        check_request([5] * 90, SamplingParams(max_tokens=11), ROOMY)
    assert check_request([5] * 90, SamplingParams(max_tokens=10), ROOMY) == 100
    assert check_request([5] * 90, SamplingParams(max_tokens=None), ROOMY) == 100


def test_capacity():
    """The last token's KV entry is never written: 65 tokens fit 64 entries."""
    assert check_request([5] * 60, SamplingParams(max_tokens=5), LIMITS) == 65
    with pytest.raises(CapacityError, match=r"65 tokens.*64"):
        check_request([5] * 60, SamplingParams(max_tokens=6), LIMITS)
    assert check_request([5] * 60, SamplingParams(max_tokens=None), LIMITS) == 65
    assert check_request([5] * 64, SamplingParams(max_tokens=None), LIMITS) == 65
    with pytest.raises(CapacityError, match=r"65 tokens.*64"):
        check_request([5] * 65, SamplingParams(max_tokens=None), LIMITS)
