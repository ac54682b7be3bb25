"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch
from torch import nn

from octavo.layers.linear import DENSE, MatrixLayer
from octavo.weights.slots import WeightSlot


class Embedding(MatrixLayer):
    """The token embedding, times `scale` rounded to the model's dtype (as Gemma does)."""

    def __init__(self, vocab_size: int, size: int, scale: float = 1.0) -> None:
        super().__init__(size, vocab_size, DENSE)
        self.scale = torch.tensor(scale, device="cpu").to(torch.get_default_dtype()).item()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] -> [num_tokens, size]"""
        vectors = self.method.lookup(self, input_ids)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, size] -> [n, vocab_size], in any dtype, ordered as the logits are."""
        return self(hidden) if self.softcap else self.method.apply(self, hidden, None)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return self.method.slots(self, prefix, 0, self.out_features)


class TiedMethod:
    """The embedding's matrix, in whatever way the embedding stores it."""

    def __init__(self, embedding: Embedding) -> None:
        self.embedding = embedding

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        """Nothing: the embedding has it."""

    def slots(self, layer: nn.Module, name: str, start: int, length: int) -> dict[str, WeightSlot]:
        return {}

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.embedding.method.apply(self.embedding, x, bias)

    def lookup(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding.method.lookup(self.embedding, ids)


class LMHead(MatrixLayer):
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
        super().__init__(size, vocab_size, DENSE if tied_to is None else TiedMethod(tied_to))
        self.softcap = softcap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, size] -> [n, vocab_size], float32"""
        logits = self.method.apply(self, hidden, None).float()
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, size] -> [n, vocab_size], in any dtype, ordered as the logits are."""
        return self(hidden) if self.softcap else self.method.apply(self, hidden, None)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return self.method.slots(self, prefix, 0, self.out_features)
