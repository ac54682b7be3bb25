"""What the runner needs of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from octavo.attention.base import AttentionSpec
from octavo.attention.context import ForwardContext
from octavo.weights.slots import WeightSlot


class CausalLM(nn.Module, ABC):
    """A decoder-only language model over a paged KV cache.

    A subclass takes (hf_config, max_model_len) and creates its parameters empty, on the default
    device and in the default dtype, which the caller sets.

    Raises:
        UnsupportedModelError: the config asks for something that the model does not implement.
    """

    attention_specs: list[AttentionSpec]  # one per layer: sizes the KV cache
    # Regular expressions of whole checkpoint names that are rightly not used.
    ignored_weights: tuple[str, ...]

    @abstractmethod
    def __init__(self, hf_config: Mapping[str, Any], max_model_len: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens] int
        positions: torch.Tensor,  # [num_tokens] int, below max_model_len
        context: ForwardContext,
    ) -> torch.Tensor:  # [num_tokens, hidden_size], or of context.last_batch.queries alone
        """Hidden states after the final norm. Writes the tokens' keys and values to the cache."""

    @abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size], float32."""

    def compute_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the logits, but of any dtype and scale: all that a greedy choice needs."""
        return self.compute_logits(hidden)

    @abstractmethod
    def weight_slots(self) -> dict[str, WeightSlot]:
        """Every checkpoint tensor that the model wants, by name."""
