"""NativeAttention against TorchAttention, and a token's independence of its batch; at the end, what
is particular to prompts on AMX.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.paged import PagedCache

from octavo.attention import AttentionSpec, TorchAttention, get_backend
from octavo.kernels.cpu import library

pytestmark = pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler")

SPECS = {
    "gqa": AttentionSpec(num_heads=9, num_kv_heads=3, head_dim=64, scale=0.125),
    "mha": AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=16, scale=0.4),
    "mqa-wide": AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=256, scale=0.05),
    "odd": AttentionSpec(num_heads=5, num_kv_heads=1, head_dim=80, scale=0.1),
    "one-key-for-all": AttentionSpec(num_heads=40, num_kv_heads=1, head_dim=16, scale=0.25),
    "window": AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, scale=0.2, sliding_window=37),
    "wide-window": AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=32, scale=0.2, sliding_window=700
    ),
    "softcap": AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=32, scale=1.0, logit_softcap=5.0
    ),
    "refused": AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=24, scale=0.2),
}


def steps_of(spec):
    """Steps of (sequence, chunk length): short and long, whole and in pieces, alone and together.

    The longest sequence is of three segments of 512 keys; where there is much to compute, of two.
    """
    first, more = (600, 513) if spec.num_heads * spec.head_dim <= 128 else (523, 131)
    return [
        [(0, 5), (1, 33), (2, first)],
        [(0, 1), (1, 1), (2, 1)],
        [(1, 1), (0, 100), (2, more)],
        [(2, 1)],
        [(0, 1), (2, 1), (3, 1)],
    ]


@pytest.fixture(params=["generic", "avx2", "avxvnni", "avx512", "neon"])
def isa(request):
    if not library.use_isa(request.param):
        pytest.skip("this CPU lacks it")
    library.set_threads(2)
    yield request.param
    library.set_threads(1)
    library.use_isa("")


@lru_cache(maxsize=4)  # the sequences of one spec; to draw them took longer than the attention
def qkv_of(seq, heads, head_dim):
    return torch.randn(1300, heads, head_dim, generator=torch.Generator().manual_seed(seq))


class Run:
    """The same random tokens of some sequences, through any backend, in any chunks."""

    def __init__(self, backend, spec, block_size=16, dtype=torch.float32, prompt_lens=()):
        self.backend, self.spec = backend, spec
        self.cache = PagedCache([spec], 256, block_size, dtype)
        self.cache.prompt_lens.update(prompt_lens)
        self.outputs: dict[int, list[torch.Tensor]] = {}

    def tokens(self, seq, start, num):
        heads = self.spec.num_heads + 2 * self.spec.num_kv_heads
        return qkv_of(seq, heads, self.spec.head_dim)[start : start + num]

    def step(self, chunks):
        starts = [self.cache.lens.get(seq, 0) for seq, _ in chunks]
        batch = self.cache.step(chunks)
        qkv = torch.cat([self.tokens(s, at, n) for (s, n), at in zip(chunks, starts, strict=True)])
        sizes = [self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads]
        got = self.backend.forward(*qkv.split(sizes, dim=1), self.cache.kv[0], batch, self.spec)
        for (seq, _), rows in zip(chunks, got.split([n for _, n in chunks]), strict=True):
            self.outputs.setdefault(seq, []).append(rows)

    def output(self, seq):
        return torch.cat(self.outputs[seq])


@pytest.mark.parametrize(
    ("block_size", "dtype"),
    [
        (8, torch.float32),
        (16, torch.float32),
        (16, torch.float16),
        (8, torch.bfloat16),
        (32, torch.bfloat16),
        (64, torch.float16),
        (128, torch.float32),
    ],
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_equals_torch(isa, spec, block_size, dtype):
    native = Run(get_backend("native"), spec, block_size, dtype)
    reference = Run(TorchAttention(), spec, block_size, dtype)
    for chunks in steps_of(spec):
        native.step(chunks)
        reference.step(chunks)
    for seq in range(4):
        torch.testing.assert_close(native.output(seq), reference.output(seq), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", [get_backend("native"), TorchAttention()])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, [65504, -65504, 65504, 65504, torch.nan, 1 / 3, 1e-7, 0.0]),
        (torch.bfloat16, [7e4, -1e30, 65519.0, torch.inf, torch.nan, 1 / 3, 1e-7, 0.0]),
    ],
)
def test_what_half_a_number_cannot_hold(isa, backend, dtype, expected):
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=16, scale=1.0)
    run = Run(backend, spec, dtype=dtype)
    batch = run.cache.step([(0, 1)])
    value = torch.tensor([7e4, -1e30, 65519.0, torch.inf, torch.nan, 1 / 3, 1e-7, 0.0] * 2)
    rows = torch.zeros(1, 1, 16)
    got = run.backend.forward(rows, rows, value.view(1, 1, 16), run.cache.kv[0], batch, spec)
    wanted = torch.tensor(expected * 2).to(dtype).float()
    torch.testing.assert_close(got.flatten(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "spec",
    [
        SPECS["gqa"],
        SPECS["window"],
        AttentionSpec(num_heads=15, num_kv_heads=5, head_dim=256, scale=0.06),  # five heads at once
        AttentionSpec(num_heads=18, num_kv_heads=6, head_dim=256, scale=0.06),  # five and one
    ],
    ids=["gqa", "window", "five", "five-and-one"],
)
def test_decodes_that_take_several_heads_at_once(isa, spec, dtype):
    """As they do where there are enough of them: never with so many threads."""
    prompts = [(0, 3), (1, 40), (2, 515), (3, 1100), (4, 31), (5, 64)]
    decodes = [[(seq, 1) for seq, _ in prompts]] * 3
    runs = []
    for threads in (1, 64):
        library.set_threads(threads)
        run = Run(get_backend("native"), spec, dtype=dtype)
        for chunks in (prompts, *decodes):
            run.step(chunks)
        runs.append(run)
    reference = Run(TorchAttention(), spec, dtype=dtype)
    for chunks in (prompts, *decodes):
        reference.step(chunks)
    for seq, _ in prompts:
        few, many = (run.output(seq)[-3:] for run in runs)
        assert torch.equal(few, many)
        torch.testing.assert_close(few, reference.output(seq)[-3:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_token_has_the_same_bits_in_any_batch_and_any_chunk(isa, spec, dtype):
    if spec is SPECS["refused"]:
        pytest.skip("torch does it")
    together = Run(get_backend("native"), spec, dtype=dtype)
    for chunks in steps_of(spec):
        together.step(chunks)
    for seq in range(3):
        alone = Run(get_backend("native"), spec, dtype=dtype)
        total = together.cache.lens[seq]
        library.set_threads(1)
        for n in (total // 2, total - total // 2 - 2, 1, 1):
            alone.step([(seq, n)])
        assert torch.equal(alone.output(seq), together.output(seq))


PROMPTS = dict.fromkeys(range(4), 10_000)  # whatever is computed is of a prompt


@pytest.fixture
def amx():
    if not library.use_isa("amx"):
        pytest.skip("this CPU lacks it")
    library.set_threads(2)
    yield
    library.set_threads(1)
    library.use_isa("")


@pytest.mark.parametrize(
    ("block_size", "dtype"),
    [(8, torch.float16), (16, torch.bfloat16), (32, torch.float16), (128, torch.bfloat16)],
)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_prompts_in_tiles_equal_torch(amx, spec, block_size, dtype):
    """Within the rounding of queries, keys, values and weights to 2**-9."""
    native = Run(get_backend("native"), spec, block_size, dtype, PROMPTS)
    reference = Run(TorchAttention(), spec, block_size, dtype)
    for chunks in steps_of(spec):
        native.step(chunks)
        reference.step(chunks)
    for seq in range(4):
        error = (native.output(seq) - reference.output(seq)).norm(dim=(1, 2))
        assert (error / reference.output(seq).norm(dim=(1, 2))).max() < 0.02
    in_vectors = Run(get_backend("native"), spec, block_size, dtype)
    in_vectors.step([(0, 5)])
    assert torch.equal(in_vectors.output(0), native.output(0)[:5]) == (spec is SPECS["refused"])


@pytest.mark.parametrize("softcap", [None, 40.0])
def test_sharp_prompts_in_tiles(amx, softcap):
    """Scores up to some hundreds, so that most weights vanish. Of numbers that bfloat16 can hold,
    queries times a power of 2 included, which is what scores in powers of 2 take.
    """
    spec = AttentionSpec(3, 1, 32, scale=16 * math.log(2), logit_softcap=softcap)
    runs = [
        Run(get_backend("native"), spec, dtype=torch.bfloat16, prompt_lens=PROMPTS),
        Run(TorchAttention(), spec, dtype=torch.bfloat16),
    ]
    for run in runs:
        run.tokens = lambda seq, start, num: qkv_of(seq, 5, 32)[start : start + num].round()
        run.step([(0, 300)])
        run.step([(0, 77), (1, 20)])
    for seq in range(2):
        got, expected = (run.output(seq) for run in runs)
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)


def test_what_is_no_number_stays_in_its_row(amx):
    """Of a prompt in tiles: a query's only its own, a key's and a value's those that see it."""
    spec, num, bad = SPECS["gqa"], 90, 40

    def run(broken, what=torch.nan, dtype=torch.float16):
        rows = qkv_of(0, 15, 64)[:num].clone()
        rows[bad, broken, 5:] = what
        run = Run(get_backend("native"), spec, dtype=dtype, prompt_lens=PROMPTS)
        run.tokens = lambda *_: rows
        run.step([(0, num)])
        return run.output(0)

    expected, query, key = run([]), run([4]), run([10])  # head 4 shares the key of head 10 - 9
    is_nan = torch.zeros(num, 9, 1, dtype=torch.bool)
    is_nan[bad, 4] = True
    assert torch.equal(query.isnan(), is_nan.expand(-1, -1, 64))
    assert torch.equal(query[~is_nan[..., 0]], expected[~is_nan[..., 0]])
    is_nan[bad:, 3:6] = True
    assert torch.equal(key.isnan(), is_nan.expand(-1, -1, 64))
    assert torch.equal(key[~is_nan[..., 0]], expected[~is_nan[..., 0]])
    for what, dtype in ((torch.nan, torch.float16), (-torch.inf, torch.bfloat16)):
        value, expected = run([13], what, dtype), run([], dtype=dtype)
        assert torch.equal(value.isnan(), is_nan.expand(-1, -1, 64))
        assert torch.equal(value[~is_nan[..., 0]], expected[~is_nan[..., 0]])


@pytest.mark.parametrize("num_threads", [1, 2, 40])  # which say how prompts are divided
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it sets what each example sets
)
@given(
    name=st.sampled_from([name for name in SPECS if name not in ("refused", "mqa-wide")]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    cuts=st.lists(st.integers(1, 640), max_size=5),
    prompt_len=st.integers(1, 640),
    prefix=st.sampled_from([0, 0, 31, 290]),
)
@example("window", torch.float16, [100], 640, 0)  # items that begin amid what others sum up at once
def test_cuts_and_neighbours_change_no_bit_of_a_prompt(
    amx, num_threads, name, dtype, cuts, prompt_len, prefix
):
    """Nor do tiles change one of an answer that is computed again, or of a float32 cache."""
    total, spec = 640, SPECS[name]
    bounds = sorted({0, *cuts, total})
    library.use_isa("avx512")
    in_vectors = Run(get_backend("native"), spec, dtype=dtype)
    in_vectors.step([(0, total)])
    library.use_isa("amx")
    library.set_threads(2)
    whole = Run(get_backend("native"), spec, dtype=dtype, prompt_lens=PROMPTS)
    whole.step([(0, total)])
    library.set_threads(num_threads)
    cut = Run(get_backend("native"), spec, 32, dtype, prompt_lens={0: prompt_len, 1: 5, 2: 400})
    cut.step([(1, 1 + prefix)])
    for begin, end in pairwise(bounds):
        cut.step([(1, 1), (0, end - begin), (2, 1 + begin % 50)])
    vectors, tiles, got = in_vectors.output(0), whole.output(0), cut.output(0)
    assert torch.equal(got[:prompt_len], tiles[:prompt_len])
    assert torch.equal(got[prompt_len:], vectors[prompt_len:])
    assert torch.equal(tiles, vectors) == (dtype is torch.float32)
