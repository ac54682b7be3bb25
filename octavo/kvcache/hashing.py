"""Block hashes: a chain over (parent's hash, the block's tokens), begun with the request's
`cache_salt`.

A cryptographic hash, because a collision would hand one user's cache to another.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_DIGEST_SIZE = 16


def extend_chain(
    chain: list[bytes], token_ids: npt.NDArray[np.int32], block_size: int, salt: str
) -> None:
    """Append the hashes of the full blocks of `token_ids` that `chain` does not cover yet.

    `token_ids` is the sequence from its first token on, [num_tokens] int32.
    """
    parent = chain[-1] if chain else salt.encode("utf-8", "surrogatepass")
    for start in range(len(chain) * block_size, len(token_ids) - block_size + 1, block_size):
        digest = hashlib.blake2b(parent, digest_size=_DIGEST_SIZE)
        digest.update(b"\0")  # ends a salt, whose length varies
        digest.update(token_ids[start : start + block_size].tobytes())
        parent = digest.digest()
        chain.append(parent)
