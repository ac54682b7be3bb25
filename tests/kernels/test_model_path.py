"""Whole models with every kernel that a GPU would use, against transformers."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.tiny_models import SIZES, PagedRun, Reference, load

pytest.importorskip("triton")

from octavo.attention import get_backend
from octavo.kernels import launch, linear


@pytest.fixture
def kernels_on(monkeypatch):
    """Kernels also for float32, and in the interpreter for tensors on the CPU."""
    from octavo.kernels import gemv_triton

    def takes(x):
        return x.ndim == 2

    def fuses(x):
        return True

    monkeypatch.setattr(launch, "takes", takes)
    monkeypatch.setattr(linear, "fuses", fuses)
    monkeypatch.setattr("octavo.models.decoder.fuses", fuses)
    monkeypatch.setattr("octavo.kernels.cpu.ops.takes", lambda x: False)

    def plan(n, out_features, in_features):
        if n > gemv_triton.MAX_GEMV_TOKENS:
            return gemv_triton.SkinnyPlan(16, 32, 4, 2) if n <= 16 else None
        return gemv_triton.GemvPlan(16, 64, 4)

    monkeypatch.setattr(gemv_triton, "plan", plan)


CONFIGS = {
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
    "llama-biased": transformers.LlamaConfig(**SIZES, attention_bias=True),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree_with_transformers(name, device, kernels_on):
    reference = Reference(CONFIGS[name])
    with torch.device(device):
        model = load(reference.hf_config(), reference.checkpoint, 64)
    sequences = [list(range(3, 31)), list(range(90, 60, -1))]
    run = PagedRun(model, sequences)
    run.backend = get_backend("triton")
    run.step((0, 20), (1, 7))
    run.step((0, 1), (1, 22))  # a mixture
    run.step((0, 1), (1, 1))  # few tokens: fused layers
    run.step((0, 1))
    for i, sequence in enumerate(sequences):
        got = run.result(i).cpu()
        expected = reference.logits(sequence)[: len(got)]
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)

    ends = PagedRun(model, sequences)
    ends.backend = get_backend("triton")
    got = [ends.ends((0, 20), (1, 7)), ends.ends((0, 1), (1, 22))]
    ends.step((0, 1), (1, 1))  # the last layer's keys and values are there
    got = [*(rows.cpu() for rows in got), torch.cat([ends.result(0), ends.result(1)]).cpu()]
    for rows, places in zip(got, [(19, 6), (20, 28), (21, 29)], strict=True):
        expected = [reference.logits(s)[at] for s, at in zip(sequences, places, strict=True)]
        torch.testing.assert_close(rows, torch.stack(expected), atol=2e-4, rtol=2e-4)
