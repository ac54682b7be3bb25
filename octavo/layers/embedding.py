"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from octavo.layers.parameter import empty_parameter, slot_of
from octavo.weights.slots import WeightSlot


class Embedding(nn.Module):
    """The token embedding, times `scale` rounded to the model's dtype (as Gemma does)."""

    def __init__(self, vocab_size: int, size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = empty_parameter(vocab_size, size)
        self.scale = torch.tensor(scale, device="cpu").to(self.weight.dtype).item()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, size]"""
        vectors = F.embedding(input_ids, self.weight)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {f"{prefix}.weight": slot_of(self.weight)}


class LMHead(nn.Module):
    """Hidden states to float32 logits, by a matrix of its own or the embedding's.

    `softcap`: logits become cap * tanh(logits / cap).
    """

    def __init__(
        self,
        vocab_size: int,
        size: int,
        *,
        tied_to: Embedding | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.is_tied = tied_to is not None
        self.weight = empty_parameter(vocab_size, size) if tied_to is None else tied_to.weight
        self.softcap = softcap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, size] -> [n, vocab_size], float32"""
        logits = F.linear(hidden, self.weight).float()
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {} if self.is_tied else {f"{prefix}.weight": slot_of(self.weight)}
