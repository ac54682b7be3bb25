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
