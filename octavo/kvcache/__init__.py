"""The paged KV cache's book-keeping: which block belongs to whom. No torch, no device memory."""

from octavo.kvcache.block_pool import BlockPool
from octavo.kvcache.cache import BlockTable, KVCache, PrefixMatch
from octavo.kvcache.hashing import extend_chain

__all__ = ["BlockPool", "BlockTable", "KVCache", "PrefixMatch", "extend_chain"]
