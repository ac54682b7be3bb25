"""Choices without sorting against choices with it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from octavo.kernels.random import uniforms
from octavo.kernels.sampling import sample_torch, token_logprobs_torch

PARAMETERS = {  # temperature, top_k, top_p, min_p
    "free": (1.0, 0, 1.0, 0.0),
    "greedy": (0.0, 5, 0.5, 0.0),
    "top-k": (0.8, 7, 1.0, 0.0),
    "top-1": (1.3, 1, 1.0, 0.0),
    "top-p": (1.0, 0, 0.8, 0.0),
    "tiny-top-p": (1.0, 0, 1e-6, 0.0),
    "min-p": (1.5, 0, 1.0, 0.1),
    "all": (0.7, 40, 0.9, 0.02),
    "k-beyond": (1.0, 10**6, 0.95, 0.0),
}


@pytest.mark.parametrize("size", [64, 4999])
@pytest.mark.parametrize("name", PARAMETERS)
def test_draws(device, name, size):
    from octavo.kernels import sampling_triton

    n = 6
    logits = 3 * torch.randn(n, size, device=device)
    logits[:, ::7] = float("-inf")
    rows = torch.tensor([PARAMETERS[name]] * n, dtype=torch.float32, device=device)
    temperature, top_k, top_p, min_p = rows.T.contiguous()
    top_k = top_k.to(torch.int64)
    seeds = torch.randint(-(2**62), 2**62, (n,), device=device)
    positions = torch.arange(n, device=device) * 1000
    numbers = uniforms(seeds, positions)
    expected = sample_torch(logits, temperature, top_k, top_p, min_p, numbers)
    got = sampling_triton.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
    assert got.tolist() == expected.tolist()


def test_greedy_takes_the_first_of_equals(device):
    from octavo.kernels import sampling_triton

    logits = torch.randn(5, 20_011, device=device)
    logits[2, [17, 9000, 20_010]] = 9.0
    logits[3, 20_010] = 9.0
    expected = logits.argmax(-1).tolist()
    expected[2] = 17
    assert sampling_triton.argmax(logits).tolist() == expected
    assert sampling_triton.argmax(logits[:1].bfloat16()).shape == (1,)


def test_logprobs(device):
    from octavo.kernels import sampling_triton

    logits = 5 * torch.randn(3, 5003, device=device)
    logits[1, 4:] = float("-inf")
    token_ids = torch.tensor([5, 2, 5002], device=device)
    got = sampling_triton.token_logprobs(logits, token_ids)
    torch.testing.assert_close(got, token_logprobs_torch(logits, token_ids))
