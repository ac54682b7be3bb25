"""What the FlashInfer backend hands over, with a plain stand-in for the package: it reads nothing
but what it was given in `plan` and `run`. The package itself is tested in tests/gpu.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import ClassVar

import pytest
import torch
from support.paged import PagedCache

pytest.importorskip("triton")

from octavo.attention import AttentionSpec, TorchAttention, get_backend
from octavo.attention.base import PackedAttention, PreparedAttention
from octavo.errors import ConfigError

SPECS = {
    "gqa": AttentionSpec(4, 2, 64, 64**-0.5),
    "window": AttentionSpec(4, 1, 64, 0.25, sliding_window=37),
    "softcap": AttentionSpec(4, 2, 64, 0.25, logit_softcap=5.0),
    "window-softcap": AttentionSpec(2, 1, 64, 0.25, sliding_window=50, logit_softcap=5.0),
}
STEPS = {
    "fresh": ([(3, 31), (4, 1), (5, 16)], 0),
    "contexts": ([(0, 31), (2, 17), (1, 1)], 0),
    "mixed": ([(0, 1), (2, 1), (3, 40), (1, 5)], 2),
}


class Event:
    """On a device that takes what it is sent at the last moment."""

    log: ClassVar[list[tuple[str, int]]] = []

    def record(self, stream: object) -> None:
        self.log.append(("record", id(self)))

    def synchronize(self) -> None:
        self.log.append(("synchronize", id(self)))


class Wrapper:
    """Attends as FlashInfer documents it, one query after the other."""

    plans: ClassVar[list[Wrapper]] = []
    error: Exception | None = None

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(self, query_starts, page_starts, page_ids, last_page_lens, *sizes, **options):
        if self.error is not None:
            raise self.error
        self.query_starts, self.page_starts = query_starts.tolist(), page_starts.tolist()
        self.page_ids, self.last_page_lens = page_ids, last_page_lens.tolist()
        *self.heads, self.page_size = sizes
        self.options = options
        Event.log.append(("plan", None))
        assert options["causal"]
        assert options["q_data_type"] == options["kv_data_type"]
        self.plans.append(self)

    def run(self, query, cache, out):
        assert len(query) == self.query_starts[-1]
        num_heads, num_kv_heads, head_dim = self.heads
        assert query.shape[1:] == (num_heads, head_dim)
        for i, last_page_len in enumerate(self.last_page_lens):
            pages = self.page_ids[self.page_starts[i] : self.page_starts[i + 1]].long()
            kv_len = (len(pages) - 1) * self.page_size + last_page_len
            assert self.options["seq_lens"][i] == kv_len
            key, value = (
                side[pages].flatten(0, 1)[:kv_len].repeat_interleave(num_heads // num_kv_heads, 1)
                for side in cache
            )
            first, stop = self.query_starts[i : i + 2]
            for row in range(first, stop):
                position = kv_len - (stop - row)
                window = self.options["window_left"]
                seen = slice(max(position - window, 0) if window >= 0 else 0, position + 1)
                scores = torch.einsum("hd,khd->hk", query[row], key[seen])
                scores = scores * self.options["sm_scale"]
                if cap := self.options["logits_soft_cap"]:
                    scores = cap * torch.tanh(scores / cap)
                out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), value[seen])


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Wrapper, "error", None)
    Wrapper.plans.clear()
    Event.log.clear()


def filled(spec: AttentionSpec, device: str) -> PagedCache:
    cache = PagedCache([spec, spec], 128, 16, device=device)
    cache.step([(0, 1), (1, 200), (2, 130)])
    for layer in cache.kv:
        layer.k.normal_()
        layer.v.normal_()
    return cache


def heads(spec: AttentionSpec, num_tokens: int, device: str) -> tuple[torch.Tensor, ...]:
    packed = torch.randn(num_tokens, spec.num_heads + 2 * spec.num_kv_heads, 64, device=device)
    return packed.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SPECS)
def test_backend_agrees_with_torch(name: str, step: str, device: str) -> None:
    spec, (chunks, num_decodes) = SPECS[name], STEPS[step]
    cache = filled(spec, device)
    batch = cache.step(chunks, num_decodes)
    qkv = heads(spec, sum(n for _, n in chunks), device)
    expected = TorchAttention().forward(*qkv, cache.kv[0], batch, spec)
    got = get_backend("flashinfer").forward(*qkv, cache.kv[0], batch, spec)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_layers_that_attend_alike_share_a_plan(device: str) -> None:
    full = SPECS["gqa"]
    local = dataclasses.replace(full, sliding_window=37)
    backend, cache = get_backend("flashinfer"), filled(full, device)
    for num_steps in (1, 2, 3):
        batch = cache.step([(1, 3)], 0)
        for spec in (local, full, local, full):
            backend.forward(*heads(spec, 3, device), cache.kv[0], batch, spec)
        assert len(Wrapper.plans) == 2 * num_steps


def test_no_plan_is_overwritten_before_the_device_has_it(device: str) -> None:
    """Steps are queued ahead of the device, and a plan lies in its wrapper's memory until read."""
    spec = SPECS["gqa"]
    backend, cache = get_backend("flashinfer"), filled(spec, device)
    for _ in range(6):
        batch = cache.step([(1, 3)], 0)
        for layer in cache.kv:
            backend.forward(*heads(spec, 3, device), layer, batch, spec)
    pending: set[int] = set()
    most_pending = 0
    for what, event in Event.log:
        (pending.add if what == "record" else pending.discard)(event)
        most_pending = max(most_pending, len(pending))
    assert [what for what, _ in Event.log] == ["synchronize", "plan", "record"] * 6
    assert most_pending == 2  # the host may be a step ahead
    assert len({id(plan) for plan in Wrapper.plans}) == 2


def test_decodes_and_last_layers_need_no_plan(device: str) -> None:
    spec = SPECS["gqa"]
    backend, cache = get_backend("flashinfer"), filled(spec, device)
    batch = cache.step([(0, 1), (1, 1)])
    backend.forward(*heads(spec, 2, device), cache.kv[0], batch, spec)
    batch = cache.step([(0, 1), (2, 9)])
    last = cache.ends(batch, [1])
    backend.forward(*heads(spec, 10, device), cache.kv[0], last, spec)
    assert not Wrapper.plans


def test_what_may_be_captured() -> None:
    backend = get_backend("flashinfer")
    assert backend.captures_decodes
    assert not backend.captures_chunks
    assert isinstance(backend, PackedAttention)
    assert isinstance(backend, PreparedAttention)
    assert not isinstance(get_backend("triton"), PreparedAttention)


@pytest.mark.parametrize(
    ("spec", "dtype", "message"),
    [
        (SPECS["gqa"], torch.float32, "not in float32. Use --dtype bfloat16 .*triton"),
        (AttentionSpec(4, 2, 96, 0.1), torch.bfloat16, "heads of 96 .*64, 128, 256.*triton"),
    ],
)
def test_models_it_cannot_run_are_refused_at_the_start(
    spec: AttentionSpec, dtype: torch.dtype, message: str
) -> None:
    backend = get_backend("flashinfer")
    with pytest.raises(ConfigError, match=message):
        backend.check([SPECS["gqa"], spec], dtype)


def test_kernels_are_loaded_for_each_kind_of_layer_once() -> None:
    backend = get_backend("flashinfer")
    layers = [SPECS["gqa"], SPECS["window"], SPECS["softcap"]] * 3
    backend.prepare(layers, torch.float16, torch.device("cpu"))
    made = [
        (plan.options["window_left"], plan.options["logits_soft_cap"]) for plan in Wrapper.plans
    ]
    assert made == [(-1, None), (36, None), (-1, 5.0)]


@pytest.mark.parametrize(
    ("error", "telling"),
    [
        (
            RuntimeError("Could not find nvcc and default cuda_home='/usr' doesn't exist"),
            "find nvcc",
        ),
        (FileNotFoundError(2, "No such file or directory", "ninja"), "'ninja'"),
        (
            RuntimeError(
                "Ninja build failed. Ninja output:\n[1/10] nvcc -c a.cu\na.cuh:52:10: fatal error: "
                "curand_kernel.h: No such file or directory\ncompilation terminated.\n"
            ),
            "curand_kernel.h: No such file",
        ),
    ],
)
def test_a_missing_compiler_is_explained(
    error: Exception, telling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrapper, "error", error)
    with pytest.raises(ConfigError) as caught:
        get_backend("flashinfer").prepare([SPECS["gqa"]], torch.float16, torch.device("cpu"))
    assert telling in str(caught.value)
    assert "nvcc (CUDA_HOME says where)" in str(caught.value)
    assert "--attention-backend triton" in str(caught.value)
    assert "[1/10]" not in str(caught.value)


def test_running_out_of_memory_is_no_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrapper, "error", torch.OutOfMemoryError("none left"))
    with pytest.raises(torch.OutOfMemoryError):
        get_backend("flashinfer").prepare([SPECS["gqa"]], torch.float16, torch.device("cpu"))


def test_a_package_that_cannot_be_imported_is_a_config_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[flashinfer\]'"):
        get_backend("flashinfer")
