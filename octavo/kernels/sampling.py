"""From logits to tokens: the choices of many requests at once, each with its own parameters.

A row keeps the tokens whose probability is at least min_p of the highest, of those the top_k most
likely, of those the fewest most likely that hold top_p of their mass, and draws from what is left.
Tokens as likely as the least likely that is kept are kept as well. A number u in [0, 1) picks the
token at which the running sum of kept probabilities, in the order of the vocabulary, passes u.
A row with temperature 0 takes its most likely token; on a CPU so does one whose highest logit is
infinite or no number.

The kernels are in `octavo.kernels.sampling_triton` and `octavo.kernels.cpu`; neither sorts.
"""

from __future__ import annotations

import torch

from octavo.kernels import launch
from octavo.kernels.cpu import ops as cpu
from octavo.kernels.random import uniforms


def sample(
    logits: torch.Tensor,  # [n, vocab] float
    temperature: torch.Tensor,  # [n] float32; 0: the most likely token
    top_k: torch.Tensor,  # [n] int64; 0: all
    top_p: torch.Tensor,  # [n] float32
    min_p: torch.Tensor,  # [n] float32
    seeds: torch.Tensor,  # [n] int64
    positions: torch.Tensor,  # [n] int64, where each sampled token will stand
) -> torch.Tensor:  # [n] int64
    """A token per row; its number is that of `uniforms`."""
    parameters = temperature, top_k, top_p, min_p
    if launch.takes(logits):
        from octavo.kernels import sampling_triton

        return sampling_triton.sample(logits, *parameters, seeds, positions)
    if cpu.suits(logits):
        return cpu.sample(logits, *parameters, seeds, positions)
    return sample_torch(logits, *parameters, uniforms(seeds, positions))


def sample_torch(
    logits: torch.Tensor,  # [n, vocab]
    temperature: torch.Tensor,  # [n] float32
    top_k: torch.Tensor,  # [n] int
    top_p: torch.Tensor,  # [n] float32
    min_p: torch.Tensor,  # [n] float32
    numbers: torch.Tensor,  # [n] float32 in [0, 1)
) -> torch.Tensor:  # [n] int64
    """Sorts the rows that have top_k or top_p."""
    highest, best = logits.float().max(dim=-1, keepdim=True)
    weights = (logits.float() - highest).div_(temperature.clamp(min=1e-10)[:, None]).exp_()
    if bool((min_p > 0).any()):
        _drop_below(weights, min_p[:, None])
    is_narrow = (temperature > 0) & ((top_k > 0) | (top_p < 1.0))
    if len(some := is_narrow.nonzero()[:, 0]):
        weights[some] = _narrow(weights[some], top_k[some], top_p[some])
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    picks = torch.searchsorted(cdf, numbers[:, None] * total, right=True)
    # Rounding may put a number at the very top; the last positive weight is where the total is
    # reached.
    picks = torch.minimum(picks, torch.searchsorted(cdf, total))
    return torch.where((temperature > 0)[:, None] & highest.isfinite(), picks, best)[:, 0]


def _narrow(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The weights, [n, vocab], with 0 for all that top_k and top_p do not keep; in place."""
    size = weights.shape[1]
    limits = torch.where(top_k > 0, top_k, size).clamp(max=size).long()
    ordered = weights.topk(int(limits.max()), dim=-1).values
    _drop_below(weights, ordered.gather(1, limits[:, None] - 1))
    if bool((top_p < 1.0).any()):
        before = ordered.cumsum(dim=-1) - ordered
        needed = top_p[:, None] * weights.sum(dim=-1, keepdim=True)
        num_kept = (before < needed).sum(dim=-1, keepdim=True).clamp(min=1)
        _drop_below(weights, ordered.gather(1, num_kept - 1))
    return weights


def _drop_below(weights: torch.Tensor, lowest: torch.Tensor) -> None:
    weights.masked_fill_(weights < lowest, 0.0)


def rate(
    logits: torch.Tensor,  # [n, vocab] float32
    token_ids: torch.Tensor,  # [n] int64
    num_top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of `token_ids` and of the most likely tokens.

    Returns:
        ids [n, 1 + num_top] int64: the given token, then the most likely, best first.
        logprobs [n, 1 + num_top] float32.
        ranks [n] int64: of the given token; 1 is the most likely.
    """
    return (cpu.rate if cpu.suits(logits) else rate_torch)(logits, token_ids, num_top)


def rate_torch(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    values, ids = logprobs.topk(num_top, dim=-1)
    return (
        torch.cat([token_ids[:, None], ids], dim=1),
        torch.cat([chosen, values], dim=1),
        (logprobs > chosen).sum(dim=-1) + 1,
    )


def token_logprobs_torch(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[n, vocab], [n] -> [n] float32: log-probability of each row's token."""
    return torch.log_softmax(logits.float(), dim=-1).gather(1, token_ids[:, None])[:, 0]


def penalise_torch(
    logits: torch.Tensor,  # [n, vocab] float32
    seen: torch.Tensor,  # [n, vocab] bool, in the prompt or the output
    counts: torch.Tensor,  # [n, vocab] int32, in the output
    values: torch.Tensor,  # [n, 3] float32: repetition, frequency and presence penalty
) -> torch.Tensor:
    """Repetition penalty over prompt and output, frequency and presence over the output only."""
    repetition, frequency, presence = values[:, :, None].unbind(1)
    factor = torch.where(seen, repetition, 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency * counts - presence * (counts > 0)
