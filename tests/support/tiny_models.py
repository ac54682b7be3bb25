"""Tiny random transformers models, and the same weights in ours."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from support.paged import PagedCache
from transformers import AutoModelForCausalLM, PreTrainedConfig

from octavo.attention import ForwardContext, TorchAttention
from octavo.models import CausalLM, create_model

SIZES = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Reference:
    """A transformers model with random weights (norms and biases as well), on the CPU."""

    def __init__(self, config: PreTrainedConfig, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.model = model.eval().requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            centre = float("norm" in name and "gemma" not in config.model_type)
            spread = 0.3 if "norm" in name or "bias" in name else 0.15
            parameter.copy_(centre + spread * torch.randn(parameter.shape))

    @functools.cached_property
    def checkpoint(self) -> dict[str, torch.Tensor]:
        """What save_pretrained writes, by name."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return safetensors.torch.load_file(Path(folder) / "model.safetensors")

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), vocab_size], of one forward pass."""
        return self.model(torch.tensor([token_ids])).logits[0]

    def hf_config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.model.config.to_dict()
        return config | {"architectures": [type(self.model).__name__]}


def load(
    hf_config: Mapping[str, Any], checkpoint: Mapping[str, torch.Tensor], max_model_len: int
) -> CausalLM:
    """Our model, filled; poisoned first, so that a parameter without a slot shows."""
    model = create_model(hf_config, max_model_len)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    slots = model.weight_slots()
    assert slots.keys() == checkpoint.keys()
    for name, slot in slots.items():
        assert slot.shape == tuple(checkpoint[name].shape), name
        slot.load(checkpoint[name])
    return model


class PagedRun:
    """Feeds sequences of known tokens to a model in chunks and keeps the logits."""

    def __init__(self, model: CausalLM, sequences: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.model = model
        self.sequences = sequences
        parameter = next(model.parameters())
        self.device = parameter.device.type
        self.cache = PagedCache(
            model.attention_specs, 128, dtype=parameter.dtype, device=self.device, seed=seed
        )
        self.backend = TorchAttention()
        self.logits: list[list[torch.Tensor]] = [[] for _ in sequences]

    def step(self, *chunks: tuple[int, int]) -> None:
        logits = self._run(chunks, only_ends=False).split([n for _, n in chunks])
        for (seq, _), rows in zip(chunks, logits, strict=True):
            self.logits[seq].append(rows)

    def ends(self, *chunks: tuple[int, int]) -> torch.Tensor:
        """Step, but of the last layer only for the chunks' last tokens: [n, vocab_size]."""
        return self._run(chunks, only_ends=True)

    def _run(self, chunks: Sequence[tuple[int, int]], *, only_ends: bool) -> torch.Tensor:
        batch = self.cache.step(chunks)
        positions = self.cache.positions(chunks)
        token_ids = [
            token
            for seq, n in chunks
            for token in self.sequences[seq][self.cache.lens[seq] - n : self.cache.lens[seq]]
        ]
        last_batch = self.cache.ends(batch, range(len(chunks))) if only_ends else None
        context = ForwardContext(batch, self.cache.kv, self.backend, last_batch)
        input_ids = torch.tensor(token_ids, device=self.device)
        return self.model.compute_logits(self.model(input_ids, positions.to(self.device), context))

    def result(self, seq: int) -> torch.Tensor:
        return torch.cat(self.logits[seq])
