"""The chain of hashes that names a prompt prefix, the same for routing, prefix cache and transfer.

Link i covers tokens [0, (i + 1) * block_size): it hashes link i - 1 and the block's token ids. Keyed blake2b, because a
hash that can be forged would let one prompt be answered from another's KV."""

from __future__ import annotations

import sys
from array import array
from hashlib import blake2b

DIGEST_SIZE = 16  # bytes


def chain_root(key: bytes, model_fingerprint: str, cache_salt: bytes = b"", adapter: str = "") -> bytes:
    """The link before the first block. Differs by model, tenant salt and adapter, so that nothing is shared across
    them."""
    digest = blake2b(key=key, digest_size=DIGEST_SIZE)
    for part in (model_fingerprint.encode(), cache_salt, adapter.encode()):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return digest.digest()


def chain_hashes(
    token_ids: array[int], block_size: int, root: bytes, key: bytes, known: list[bytes] | None = None
) -> list[bytes]:
    """Links of all full blocks of token_ids; `known` are the first links, where they have been computed before."""
    assert token_ids.itemsize == 4 and sys.byteorder == "little"
    links = list(known) if known else []
    previous = links[-1] if links else root
    view = memoryview(token_ids).cast("B")
    stride = 4 * block_size
    for start in range(len(links) * stride, len(view) - stride + 1, stride):
        digest = blake2b(previous, key=key, digest_size=DIGEST_SIZE)
        digest.update(view[start : start + stride])
        previous = digest.digest()
        links.append(previous)
    return links


def fold_links(links: list[bytes], ratio: int) -> list[bytes]:
    """Links at every ratio-th block: the chain of a KV block of `ratio` hash blocks, or of a routing key's unit."""
    return links if ratio == 1 else links[ratio - 1 :: ratio]
