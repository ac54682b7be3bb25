"""`SamplingParams`: what is let in, and which field a refusal names."""

from __future__ import annotations

import math

import pytest

from octavo.errors import InvalidRequestError
from octavo.types import MAX_N, SamplingParams

NUMBERS = [  # field, allowed, refused
    ("n", [1, MAX_N], [0, MAX_N + 1, 1.0, True, "1"]),
    ("presence_penalty", [-2, 0.0, 2], [-2.1, 2.1, math.nan, "0", None]),
    ("frequency_penalty", [-2, 0.0, 2], [-2.1, 2.1, math.inf]),
    ("repetition_penalty", [0.01, 1, 100], [0, -1, 101, math.nan]),
    ("temperature", [0, 0.5, 100], [-0.1, 101, math.nan, math.inf, True]),
    ("top_p", [0.001, 1, 1.0], [0, 1.1, -1, math.nan]),
    ("top_k", [-1, 0, 1, 2**31 - 1], [-2, 2**31, 1.5]),
    ("min_p", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    ("seed", [None, 0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 1.0]),
    ("max_tokens", [None, 1, 2**31 - 1], [0, -1, 2**31, "16"]),
    ("min_tokens", [0, 16], [-1, None]),
    ("logprobs", [None, 0, 20], [-1, 21, True]),
    ("prompt_logprobs", [None, 0, 20], [-1, 21]),
    ("stop", [None, "x", [], ["a", "b"], ("a",)], [[""], "", [1], ["x"] * 65, 5]),
    ("stop_token_ids", [None, [], [0, 5]], [[-1], [1.0], ["a"], "ab", 7]),
    ("bad_words", [None, [], ["a"]], [[""], [3], ["x"] * 513, "word", 7]),
    ("allowed_token_ids", [None, [3]], [[], [-1], ["a"], "ab", 7]),
    (
        "logit_bias",
        [None, {}, {0: -100, 5: 100.0}],
        [{-1: 1}, {1: 101}, {1: math.nan}, {"1": 1}, dict.fromkeys(range(1025), 1.0), [1]],
    ),
]


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, allowed, _ in NUMBERS for v in allowed])
def test_allowed(name: str, value: object) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, _, refused in NUMBERS for v in refused])
def test_refused_with_the_fields_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"stop": "x", "detokenize": False}, "stop"),
    ],
)
def test_combinations_refused(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_lists_become_tuples_and_a_string_becomes_one_of_them() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1], bad_words=["x"], allowed_token_ids=[2])
    assert params.stop_strings == ("end",)
    assert (params.stop_token_ids, params.bad_words, params.allowed_token_ids) == (
        (1,),
        ("x",),
        (2,),
    )
    assert SamplingParams(top_k=-1).top_k == 0
    assert hash(params) == hash(params.replace())


def test_replace_checks_again() -> None:
    assert SamplingParams().replace(max_tokens=3).max_tokens == 3
    with pytest.raises(InvalidRequestError):
        SamplingParams().replace(max_tokens=0)


def test_properties() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams().is_greedy
    assert not SamplingParams().uses_penalties
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert SamplingParams(**{name: 0.5}).uses_penalties
