"""From logits to tokens: the choices of many requests at once, each with its own parameters.

The twins; the kernels are in `octavo.kernels.sampling_triton`. A row keeps the tokens whose
probability is at least min_p of the highest, of those the top_k most likely, of those the fewest
most likely that hold top_p of the mass, and draws from what is left. A number u in [0, 1) picks
the token at which the running sum of kept probabilities, in the order of the vocabulary, passes u.
"""

from __future__ import annotations

import torch


def sample_torch(
    logits: torch.Tensor,  # [n, vocab]
    temperature: torch.Tensor,  # [n] float32; 0: the most likely token
    top_k: torch.Tensor,  # [n] int; 0: all
    top_p: torch.Tensor,  # [n] float32
    min_p: torch.Tensor,  # [n] float32
    numbers: torch.Tensor,  # [n] float32 in [0, 1)
) -> torch.Tensor:  # [n] int64
    """Sorts every row. Tokens as likely as the least likely that is kept are kept as well."""
    greedy = logits.argmax(dim=-1)
    wide = logits.float()
    wide = wide - wide.amax(dim=-1, keepdim=True)
    weights = torch.exp(wide / temperature.clamp(min=1e-10)[:, None])
    weights = weights.masked_fill(weights < min_p[:, None], 0.0)
    ordered = weights.sort(dim=-1, descending=True).values
    ranks = torch.arange(logits.shape[1], device=logits.device)
    limits = torch.where(top_k > 0, top_k, logits.shape[1])
    ordered = ordered.masked_fill(ranks >= limits[:, None], 0.0)
    before = ordered.cumsum(dim=-1) - ordered
    kept = (before < top_p[:, None] * ordered.sum(dim=-1, keepdim=True)) & (ordered > 0)
    lowest = torch.where(kept, ordered, torch.inf).amin(dim=-1, keepdim=True)
    cdf = weights.masked_fill(weights < lowest, 0.0).cumsum(dim=-1)
    total = cdf[:, -1:].contiguous()
    picks = torch.searchsorted(cdf, numbers[:, None] * total, right=True)
    picks = torch.minimum(picks, torch.searchsorted(cdf, total))[:, 0]
    return torch.where(temperature > 0, picks, greedy)


def token_logprobs_torch(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[n, vocab], [n] -> [n] float32: log-probability of each row's token."""
    return torch.log_softmax(logits.float(), dim=-1).gather(1, token_ids[:, None])[:, 0]
