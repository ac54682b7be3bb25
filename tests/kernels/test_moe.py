"""Routing and grouped products against expert after expert."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.moe import Routing, route_torch, run_experts_torch


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (13, 5)])
def test_route(device, num_experts, top_k, renormalise):
    from octavo.kernels import moe_triton

    logits = torch.randn(9, num_experts, device=device)
    expected = route_torch(logits, top_k, renormalise=renormalise)
    weights, experts = moe_triton.route(logits, top_k, renormalise)
    torch.testing.assert_close(weights, expected.weights)
    assert torch.equal(experts, expected.experts)


@pytest.mark.parametrize("num_pairs", [3, 40, 4500, 8192, 8193, 20_000])
def test_grouping_is_a_stable_sort(device, num_pairs):
    from octavo.kernels import moe_triton

    experts = torch.randint(0, 7, (num_pairs,), dtype=torch.int32, device=device)
    order, starts = moe_triton.group(experts, 9)
    by_expert, expected = experts.sort(stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(starts.long(), torch.searchsorted(by_expert, torch.arange(10).to(device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 5, 29])
def test_experts(device, num_tokens, dtype):
    from octavo.kernels import moe_triton

    num_experts, top_k, size, intermediate = 5, 3, 40, 82
    x = torch.randn(num_tokens, size, device=device).to(dtype)
    gate_up = torch.randn(num_experts, 2 * intermediate, size, device=device).to(dtype) / 6
    down = torch.randn(num_experts, size, intermediate, device=device).to(dtype) / 9
    logits = torch.randn(num_tokens, num_experts, device=device)
    routing = route_torch(logits, top_k, renormalise=True)
    expected = run_experts_torch(x, gate_up, down, Routing(*routing), "silu")
    got = moe_triton.run_experts(x, gate_up, down, *routing, "silu")
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    got = moe_triton.run_experts(x, gate_up, down, *routing, "silu", x.clone())
    torch.testing.assert_close(got, expected + x, atol=tolerance, rtol=tolerance)


def test_experts_whose_weights_come_as_tiles(device, monkeypatch):
    from octavo.kernels import launch, moe_triton

    plan = moe_triton.GroupedPlan(64, 32, 32, 4, 2)
    monkeypatch.setattr(launch, "copies_tiles", lambda device: True)
    monkeypatch.setattr(moe_triton, "choose_plan", lambda *args, **kwargs: plan)
    x = torch.randn(70, 64, device=device).half()
    gate_up = torch.randn(3, 2 * 96, 64, device=device).half() / 8
    down = torch.randn(3, 64, 96, device=device).half() / 10
    routing = route_torch(torch.randn(70, 3, device=device), 2, renormalise=True)
    expected = run_experts_torch(x, gate_up, down, Routing(*routing), "silu")
    got = moe_triton.run_experts(x, gate_up, down, *routing, "silu")
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3)
