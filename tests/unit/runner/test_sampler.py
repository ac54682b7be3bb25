"""The sampler against transformers' processors, against statistics, and against itself in other
company.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from octavo.kernels.cpu import library, ops
from octavo.kernels.random import uniforms
from octavo.runner.sampler import Sampler
from octavo.sched.plan import RowAdmission
from octavo.types import EngineRequest, SamplingParams

VOCAB = 40


@pytest.fixture(autouse=True, scope="module", params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything with native code and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(ops, "_LIBRARY", None)
        elif not library.is_available():
            pytest.skip("not built: no C compiler")
        yield


def make_request(
    prompt: Sequence[int] = (1, 2, 3), seed: int = 0, **options: object
) -> EngineRequest:
    bad_words = options.pop("bad_words_token_ids", ())
    stops = options.pop("stop_ids", ())
    return EngineRequest(
        request_id=1,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**options),  # type: ignore[arg-type]
        max_total_len=1000,
        seed=seed,
        bad_words_token_ids=bad_words,  # type: ignore[arg-type]
        stop_token_ids=stops,  # type: ignore[arg-type]
    )


class Bench:
    """A sampler with one request per row."""

    def __init__(self, *requests: EngineRequest, outputs: Sequence[tuple[int, ...]] = ()) -> None:
        self.sampler = Sampler(len(requests) + 3, VOCAB, torch.device("cpu"))
        self.requests = requests
        for row, request in enumerate(requests):
            output = outputs[row] if outputs else ()
            self.sampler.admit(RowAdmission(row, request, output))

    def sample(
        self, logits: torch.Tensor, step: int = 0, rows: Sequence[int] | None = None
    ) -> list[int]:
        picked = np.array(range(len(self.requests)) if rows is None else rows, np.int32)
        lens = [len(self.requests[row].prompt_token_ids) + step for row in picked]
        tokens, self.logprobs = self.sampler.sample(
            logits.clone(), picked, np.array(lens, np.int32)
        )
        return tokens.tolist()


def shaped(
    request: EngineRequest, logits: torch.Tensor, outputs: tuple[int, ...] = ()
) -> torch.Tensor:
    """The logits as the sampler shapes them before drawing."""
    bench = Bench(request, outputs=[outputs])
    position = np.array([len(request.prompt_token_ids) + len(outputs)], np.int32)
    out = logits.clone()[None]
    bench.sampler._restrict(out, np.array([0], np.int32), position)
    return out[0]


def frequencies(
    request_options: dict[str, object], logits: torch.Tensor, num: int = 20_000
) -> torch.Tensor:
    """Observed token frequencies over many positions of one request, sampled a thousand at a
    time.
    """
    rows = 1000
    bench = Bench(*(make_request(seed=seed, **request_options) for seed in range(rows)))
    counts = torch.zeros(VOCAB)
    for step in range(num // rows):
        tokens = bench.sample(logits.expand(rows, VOCAB), step)
        counts += torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    return counts / num


def chi_square_ok(observed: torch.Tensor, expected: torch.Tensor, num: int) -> bool:
    """Within 5 sigma of the chi-square distribution's mean."""
    assert observed[expected == 0].sum() == 0, "a forbidden token was drawn"
    keep = expected > 0
    statistic = float(((observed - expected)[keep] ** 2 / expected[keep]).sum() * num)
    freedom = max(int(keep.sum()) - 1, 1)
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


LOGITS = torch.linspace(-3, 3, VOCAB)[
    torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))
]
IDS = torch.zeros((1, 1), dtype=torch.long)


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"top_k": 12, "top_p": 0.8}, [TopKLogitsWarper(12), TopPLogitsWarper(0.8)]),
        (
            {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
            [TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
        ),
        (
            {"temperature": 1.3, "min_p": 0.1},
            [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.1)],
        ),
    ],
)
def test_distribution_is_that_of_transformers(options: dict[str, object], warpers: list) -> None:
    logits = LOGITS.clone()[None]
    for warper in warpers:
        logits = warper(IDS, logits)
    expected = logits.softmax(-1)[0]
    assert chi_square_ok(frequencies(options, LOGITS), expected, 20_000)


def test_chi_square_can_fail() -> None:
    expected = (LOGITS / 1.1).softmax(-1)
    assert not chi_square_ok(frequencies({}, LOGITS), expected, 20_000)


def test_repetition_penalty_is_that_of_transformers() -> None:
    request = make_request((1, 2, 3), repetition_penalty=1.4)
    got = shaped(request, LOGITS, outputs=(7, 7, 9))
    ids = torch.tensor([[1, 2, 3, 7, 7, 9]])
    expected = RepetitionPenaltyLogitsProcessor(1.4)(ids, LOGITS.clone()[None])[0]
    torch.testing.assert_close(got, expected)


def test_frequency_and_presence_count_the_output_only() -> None:
    request = make_request((1, 2, 3), frequency_penalty=0.5, presence_penalty=0.25)
    got = shaped(request, LOGITS, outputs=(7, 7, 9))
    expected = LOGITS.clone()
    expected[7] -= 2 * 0.5 + 0.25
    expected[9] -= 0.5 + 0.25
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("output", [(), (4,), (4, 5), (9, 4, 5), (5, 4)])
def test_bad_words_are_those_of_transformers(output: tuple[int, ...]) -> None:
    words = ((8,), (4, 6), (4, 5, 7), (5, 7))
    got = shaped(make_request((20, 21), bad_words_token_ids=words), LOGITS, outputs=output)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=39)
    expected = processor(torch.tensor([[20, 21, *output]]), LOGITS.clone()[None])[0]
    assert torch.equal(got == -torch.inf, expected == -torch.inf)


def test_penalties_follow_what_is_sampled() -> None:
    """State kept step by step equals state rebuilt from the output, as after a preemption."""
    options = {
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
    }
    words = ((4, 6), (5, 7, 8))
    request = make_request(seed=3, bad_words_token_ids=words, **options)
    bench, output = Bench(request), []
    for step in range(30):
        [token] = bench.sample(LOGITS[None], step)
        rebuilt = Bench(request, outputs=[tuple(output)])
        assert rebuilt.sample(LOGITS[None], step) == [token]
        output.append(token)


def test_bias_allowed_tokens_and_minimum_length() -> None:
    assert Bench(make_request(temperature=0, logit_bias={11: 100.0})).sample(LOGITS[None]) == [11]
    allowed = make_request(temperature=1, allowed_token_ids=[2, 30])
    bench = Bench(allowed)
    assert {bench.sample(LOGITS[None], step)[0] for step in range(50)} == {2, 30}
    best = int(LOGITS.argmax())
    bench = Bench(make_request(temperature=0, min_tokens=3, stop_ids=(best,)))
    tokens = [bench.sample(LOGITS[None], step)[0] for step in range(4)]
    assert best not in tokens[:3]
    assert tokens[3] == best


def test_logprobs_are_raw_and_ranked() -> None:
    request = make_request(temperature=0, logit_bias={11: 100.0}, logprobs=3)
    bench = Bench(make_request(temperature=0), request)
    bench.sample(LOGITS.expand(2, VOCAB))
    entry = bench.logprobs.to_host()[1]
    raw = LOGITS.log_softmax(-1)
    order = raw.argsort(descending=True)
    assert entry.token_ids == (11, *order[:3].tolist())
    assert entry.logprobs == pytest.approx([float(raw[i]) for i in entry.token_ids], abs=1e-5)
    assert entry.rank == order.tolist().index(11) + 1


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.integers(0, VOCAB),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
        "logprobs": st.sampled_from([None, 0, 4]),
    },
)


@examples(150)
@given(st.lists(OPTIONS, min_size=2, max_size=6), st.integers(0, 2**31))
def test_a_row_draws_the_same_alone_and_in_company(options: list[dict], seed: int) -> None:
    requests = [make_request(seed=seed + i, **option) for i, option in enumerate(options)]
    logits = torch.randn((len(requests), VOCAB), generator=torch.Generator().manual_seed(seed)) * 4
    company = Bench(*requests)
    alone = [Bench(request) for request in requests]
    for step in range(3):
        together = company.sample(logits, step)
        assert together == [b.sample(logits[i : i + 1], step)[0] for i, b in enumerate(alone)]


def test_a_reused_row_forgets_its_former_tenant() -> None:
    bench = Bench(
        make_request(temperature=0, logit_bias={11: 100.0}, repetition_penalty=2.0, logprobs=2)
    )
    bench.sample(LOGITS[None])
    bench.sampler.free(0)
    bench.sampler.admit(RowAdmission(0, make_request(temperature=0)))
    assert bench.sample(LOGITS[None]) == [int(LOGITS.argmax())]
    assert bench.logprobs is None


def test_every_token_stays_possible_in_a_wide_top_p() -> None:
    """With a flat distribution all tokens are equally likely, so all are kept."""
    vocab, rows = 2000, 4000
    sampler = Sampler(rows, vocab, torch.device("cpu"))
    for row in range(rows):
        sampler.admit(RowAdmission(row, make_request(top_p=0.9, seed=row)))
    logits = torch.zeros((rows, vocab))
    tokens, _ = sampler.sample(logits, np.arange(rows, dtype=np.int32), np.full(rows, 3, np.int32))
    assert tokens.unique().numel() > 1600  # 4,000 draws of 2,000 tokens: about 1,729 distinct


def test_uniforms_are_uniform_and_independent() -> None:
    seeds, positions = torch.arange(300).repeat_interleave(300), torch.arange(300).repeat(300)
    numbers = uniforms(seeds, positions)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    histogram = torch.histc(numbers, 50, 0, 1) / len(numbers)
    assert chi_square_ok(histogram, torch.full((50,), 1 / 50), len(numbers))
    grid = numbers.view(300, 300) - 0.5
    for lagged in (grid[1:] * grid[:-1], grid[:, 1:] * grid[:, :-1]):
        assert abs(float(lagged.mean())) * 12 < 5 / lagged.numel() ** 0.5
    assert torch.equal(uniforms(seeds[:5], positions[:5]), numbers[:5])
