"""Drawing and rating tokens in native code, in every instruction set that this CPU has."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from octavo.kernels.cpu import library, ops
from octavo.kernels.random import uniforms
from octavo.kernels.sampling import penalise_torch, rate, rate_torch, sample, sample_torch

pytestmark = pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler")

ISAS = ("generic", "avx2", "avxvnni", "avx512", "neon")
SLACK = 1e-5  # what rounding may shift a share of the mass by
LAST_POSITION = 26_683_239  # where the number of seed 0 is the largest there is


@pytest.fixture(params=ISAS)
def isa(request):
    if not library.use_isa(request.param):
        pytest.skip("this CPU lacks it")
    yield request.param
    library.use_isa("")


class Row(NamedTuple):
    """How one row is sampled."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def columns(rows: list[Row]) -> list[torch.Tensor]:
    """The parameters as `sample` takes them, one tensor of each kind."""
    dtypes = torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64
    return [
        torch.tensor(values, dtype=dtype)
        for values, dtype in zip(zip(*rows, strict=True), dtypes, strict=True)
    ]


def is_right(token: int, logits: torch.Tensor, row: Row) -> bool:
    """Whether the number of a row (temperature above 0) may pick the token, in float64."""
    number = float(uniforms(torch.tensor([row.seed]), torch.tensor([row.position])))
    weights = torch.exp((logits.double() - logits.max()) / row.temperature)
    slacks = (-SLACK, 0.0, SLACK)
    for shift, factor in itertools.product(slacks, slacks):
        kept = weights * (weights >= row.min_p * (1 + factor))
        ordered = kept.sort(descending=True).values
        if 0 < row.top_k < len(kept):
            kept = kept * (kept >= ordered[row.top_k - 1])
            ordered = kept.sort(descending=True).values
        if row.top_p < 1:
            before = ordered.cumsum(0) - ordered
            num = max(int((before < (row.top_p + shift) * kept.sum()).sum()), 1)
            kept = kept * (kept >= ordered[num - 1])
        passed = kept.cumsum(0) / kept.sum()
        low = float(passed[token - 1]) if token else 0.0
        if kept[token] > 0 and low - SLACK <= number <= float(passed[token]) + SLACK:
            return True
    return False


SIZES = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 821, 2089, 4999])
ROWS = st.builds(
    Row,
    temperature=st.sampled_from([0.05, 0.5, 1.0, 1.3, 4.0, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 40, 300, 10**6]),
    top_p=st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**20),
)


def make_logits(num_rows: int, size: int, seed: int, forbidden: float, grain: float):
    """Multiples of `grain`, so that there are ties, but no near ones; some are -inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((num_rows, size), generator=generator) * 4
    logits = (logits / grain).round() * grain
    gone = torch.rand((num_rows, size), generator=generator) < forbidden
    gone[:, int(torch.randint(size, (1,), generator=generator))] = False
    return logits.masked_fill(gone, -torch.inf)


@pytest.mark.parametrize("isa_name", ISAS)
@examples(60)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=5),
    size=SIZES,
    seed=st.integers(0, 2**31),
    forbidden=st.sampled_from([0.0, 0.3, 1.0]),
    grain=st.sampled_from([2.0**-10, 1.0]),
)
def test_draws_what_it_should(isa_name, rows, size, seed, forbidden, grain):
    """Native code and its twin, against the definition in float64."""
    logits = make_logits(len(rows), size, seed, forbidden, grain)
    parameters = columns(rows)
    if not library.use_isa(isa_name):
        pytest.skip("this CPU lacks it")
    try:
        native = sample(logits, *parameters)
    finally:
        library.use_isa("")
    plain = sample_torch(logits, *parameters[:4], uniforms(*parameters[4:]))
    for i, row in enumerate(rows):
        assert is_right(int(native[i]), logits[i], row)
        assert is_right(int(plain[i]), logits[i], row)


def test_the_definition_can_be_missed():
    logits, row = torch.zeros(64), Row(position=1)
    right = [token for token in range(64) if is_right(token, logits, row)]
    assert right == sample(logits[None], *columns([row])).tolist()
    assert not is_right(62, torch.arange(64.0), Row(top_p=0.5))


VARIETY = [
    Row(temperature, top_k, top_p, min_p)
    for temperature in (0.0, 0.7, 1.5)
    for top_k in (0, 50, 3000)
    for top_p in (1.0, 0.95, 0.5)
    for min_p in (0.0, 0.02)
]


@pytest.fixture(scope="module")
def varied():
    """Rows of every kind, over narrow and flat logits."""
    rows = [row._replace(seed=i, position=7 * i) for i, row in enumerate(VARIETY * 2)]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((len(rows), 20_011), generator=generator)
    logits[: len(VARIETY)] *= 4
    return logits, rows


def test_every_instruction_set_draws_the_same(isa, varied):
    logits, rows = varied
    got = sample(logits, *columns(rows))
    library.use_isa("generic")
    assert torch.equal(got, sample(logits, *columns(rows)))


def test_a_row_draws_the_same_in_any_batch_and_on_any_number_of_threads(isa, varied):
    logits, rows = varied
    whole = sample(logits, *columns(rows))
    try:
        for num_threads, start, stop in ((2, 0, 108), (3, 5, 60), (2, 7, 8), (1, 40, 43)):
            library.set_threads(num_threads)
            part = sample(logits[start:stop], *columns(rows[start:stop]))
            assert torch.equal(part, whole[start:stop])
    finally:
        library.set_threads(1)
    backwards = sample(logits.flip(0), *columns(rows[::-1]))
    assert torch.equal(backwards.flip(0), whole)
    spread = torch.zeros((len(rows), 20_100))
    spread[:, 50:-39] = logits
    assert torch.equal(sample(spread[:, 50:-39], *columns(rows)), whole)


def test_agrees_with_the_twin(varied):
    logits, rows = varied
    parameters = columns(rows)
    plain = sample_torch(logits, *parameters[:4], uniforms(*parameters[4:]))
    differ = (sample(logits, *parameters) != plain).sum()
    assert differ <= 1  # a number within rounding of the border between two tokens


def test_numbers_are_those_of_uniforms():
    """Of 2^k equally likely tokens, u picks the one at u * 2^k."""
    rows = [Row(seed=s, position=p) for s in (0, -1, 2**62, -(2**63)) for p in (0, 1, 99_999)]
    got = sample(torch.zeros((len(rows), 4096)), *columns(rows))
    numbers = uniforms(*columns(rows)[4:])
    assert torch.equal(got, (numbers * 4096).long())


def test_frequencies_are_the_probabilities(isa):
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    logits = torch.linspace(-4, 2, 100)[order]
    num = 40_000
    for row in (Row(), Row(temperature=1.7, top_p=0.8), Row(top_k=30, min_p=0.05)):
        *shape, _, position = (column.expand(num).contiguous() for column in columns([row]))
        tokens = sample(logits.expand(num, 100), *shape, torch.arange(num), position)
        weights = torch.softmax(logits / row.temperature, 0)
        weights = weights * (weights >= row.min_p * weights.max())
        order = weights.argsort(descending=True)
        weights[order[row.top_k or 100 :]] = 0
        passed = weights[order].cumsum(0) / weights.sum()
        weights[order[1:][passed[:-1] >= row.top_p]] = 0
        expected = weights / weights.sum() * num
        observed = torch.bincount(tokens, minlength=100)
        assert observed[expected == 0].sum() == 0
        kept = expected > 0
        statistic = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
        freedom = int(kept.sum()) - 1
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("row", [Row(), Row(top_k=3), Row(top_p=0.5), Row(min_p=0.1)])
def test_what_is_forbidden_is_never_drawn(isa, row):
    logits = torch.full((50, 333), -torch.inf)
    logits[:, 222] = -1e30
    rows = [row._replace(seed=i) for i in range(50)]
    assert set(sample(logits, *columns(rows)).tolist()) == {222}
    logits[:, 332] = -1e30  # as likely
    assert set(sample(logits, *columns(rows)).tolist()) == {222, 332}


def test_rows_that_are_not_finite_take_their_highest(isa):
    logits = torch.randn(4, 1000)
    logits[0] = -torch.inf
    logits[1, 700] = torch.nan
    logits[2, [8, 900]] = torch.inf
    logits[3, 5] = 3e38
    logits[3, 6] = -3e38
    rows = [Row(top_p=0.9), Row(), Row(top_k=5), Row(min_p=0.1)]
    assert sample(logits, *columns(rows)).tolist() == [0, 700, 8, 5]
    plain = sample_torch(logits, *columns(rows)[:4], torch.full((4,), 0.5))
    assert plain.tolist() == [0, 700, 8, 5]


def test_temperatures_from_nothing_to_infinity(isa):
    logits = torch.tensor([[1.0, 3.0, 2.999, -torch.inf]]).repeat(400, 1)
    for temperature, expected in ((1e-45, {1}), (1e-6, {1}), (3e38, {0, 1, 2})):
        rows = [Row(temperature, seed=i) for i in range(400)]
        assert set(sample(logits, *columns(rows)).tolist()) == expected
    rows = [Row(torch.inf, top_p=0.99, seed=i) for i in range(400)]
    assert set(sample(logits, *columns(rows)).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("row", [Row(top_k=2), Row(top_p=0.5), Row(top_k=3, top_p=0.6)])
def test_close_logits_are_told_apart(isa, row):
    """What is kept ends between neighbouring floats, but not between equally likely tokens."""
    rows = columns([row._replace(seed=i) for i in range(300)])
    logits = torch.zeros((300, 150))
    for places in ([10, 20, 30], [10, 20, 140], [10, 80, 140]):
        values = torch.tensor([20.0, 20.0 - 2**-19, 20.0 - 2**-18])
        logits[:] = 0
        logits[:, places] = values
        assert set(sample(logits, *rows).tolist()) == set(places[:2])
        logits[:] = -20
        logits[:, places] = torch.tensor([0.0, -1e-9, -2e-9])  # e^x is 1 for all
        assert set(sample(logits, *rows).tolist()) == set(places)


def test_a_number_at_the_very_top_finds_a_token_that_is_kept(isa):
    seed, position = 0, LAST_POSITION
    assert float(uniforms(torch.tensor([seed]), torch.tensor([position]))) == 1 - 2.0**-24
    logits = make_logits(2000, 300, 7, 0.5, 2.0**-10)
    logits[:, 200:] = -torch.inf
    logits[:, 150:160] -= 30  # too unlikely to be seen in a sum
    for row in (Row(), Row(top_p=0.99), Row(top_k=30), Row(temperature=0.3)):
        rows = [row._replace(seed=seed, position=position)] * len(logits)
        tokens = sample(logits, *columns(rows))
        assert logits.gather(1, tokens[:, None]).isfinite().all()


@pytest.mark.parametrize("size", [1, 17, 64, 821, 20_011])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_rating(isa, size, num_top):
    num_top = min(num_top, size)
    torch.manual_seed(size)
    logits = torch.randn(6, size) * 5
    logits[1, size // 2 :] = -torch.inf
    logits[1, 0] = 0.0
    logits[2] += 1000
    ids = torch.tensor([0, size - 1, size // 2, 0, size // 3, int(logits[5].argmax())])
    library.set_threads(2)
    got, expected = rate(logits, ids, num_top), rate_torch(logits, ids, num_top)
    library.set_threads(1)
    torch.testing.assert_close(got[1], expected[1], atol=2e-6, rtol=2e-6)
    assert torch.equal(got[2], expected[2])
    finite = expected[1].isfinite()  # of forbidden tokens any may come first
    assert torch.equal(got[0][finite], expected[0][finite])
    alone = rate(logits[2:3], ids[2:3], num_top)
    assert all(torch.equal(a, b[2:3]) for a, b in zip(alone, got, strict=True))


def test_rating_of_equals_and_of_what_is_no_number(isa):
    logits = torch.zeros(3, 200)
    logits[0, [150, 30, 199]] = 1.0
    logits[1, 4] = torch.nan
    logits[2] = -torch.inf
    ids, logprobs, ranks = rate(logits, torch.tensor([199, 2, 3]), 4)
    assert ids[0].tolist() == [199, 30, 150, 199, 0]
    assert ranks[0] == 1
    assert logprobs[1:].isnan().all()
    with pytest.raises(IndexError):
        rate(logits, torch.tensor([0, 200, 0]), 1)
    with pytest.raises(ValueError, match="201"):
        rate(logits, torch.tensor([0, 0, 0]), 201)


@pytest.mark.parametrize("size", [1, 7, 8, 821])
def test_penalties_are_those_of_the_twin(size):
    logits = torch.randn(4, size) * 5
    logits[0, ::5] = -torch.inf
    seen = torch.rand(4, size) < 0.3
    seen[3, -1] = True
    counts = torch.randint(0, 4, (4, size), dtype=torch.int32) * seen
    values = [(1.0, 0.5, 0.0), (1.3, 0.0, 0.0), (0.7, 0.1, 0.2), (1.1, -2.0, 1.7)]
    expected = penalise_torch(logits, seen, counts, torch.tensor(values))
    for i, row_values in enumerate(values):
        ops.penalise(logits[i], seen[i], counts[i], row_values)
    assert torch.equal(logits, expected)


def test_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    parameters = [torch.empty(0)] * 4 + [empty] * 2
    assert len(sample(torch.empty(0, 50), *parameters)) == 0
    assert len(rate(torch.empty(0, 50), empty, 2)[0]) == 0
