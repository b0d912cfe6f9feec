"""Our own chained hash of prompt blocks: the router's keys, whatever the engines call theirs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_DIGEST_BYTES = 8
_TOKEN_BYTES = 4


def chain_seed(model: str, lora: str | None = None, cache_salt: str | None = None) -> int:
    """Where a chain starts: prompts of other models, adapters or tenants share nothing."""
    parts = (model, lora or "", cache_salt or "")
    text = "\0".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest(), "big")


def block_hashes(token_ids: Sequence[int], block_size: int, parent: int) -> list[int]:
    """64-bit hashes of the full blocks, each over its parent's hash and its own tokens (32-bit little-endian).

    `parent` is `chain_seed(...)` or the hash of the block before the first token; a trailing partial block has none.
    """
    size = block_size * _TOKEN_BYTES
    data = array("I", token_ids).tobytes()
    digest = parent.to_bytes(_DIGEST_BYTES, "big")
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        digest = blake2b(digest + data[start : start + size], digest_size=_DIGEST_BYTES).digest()
        hashes.append(int.from_bytes(digest, "big"))
    return hashes
