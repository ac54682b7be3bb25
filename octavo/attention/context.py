"""What a model's forward pass is given besides its tokens: by argument, nothing is global."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.attention.base import AttentionBackend, AttentionBatch, KVLayer


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One step's attention metadata, the cache of every layer, and who attends."""

    batch: AttentionBatch
    kv: tuple[KVLayer, ...]  # by layer
    backend: AttentionBackend
    # For the last layer, with `queries`: hidden states are wanted of those tokens alone, and the
    # others need no more of it than their keys and values. None: of all.
    last_batch: AttentionBatch | None = None

    def batch_of(self, layer_idx: int) -> AttentionBatch:
        """What the layer attends."""
        if self.last_batch is not None and layer_idx == len(self.kv) - 1:
            return self.last_batch
        return self.batch
