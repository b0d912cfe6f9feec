"""Our own chained hash of prompt blocks: the router's keys, whatever the engines call theirs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache

from xxhash import xxh3_64_intdigest

from backends.kv_events import TOKEN_CODE

TOKEN_BYTES = 4
_HASH = (1 << 60) - 1
"""What CPython keeps in 32 bytes, not 48. The chance of two alike among a million blocks is 4e-7."""


@lru_cache(maxsize=4096)
def chain_seed(model: str, lora: str | None = None, cache_salt: str | None = None) -> int:
    """Where a chain starts: prompts of other models, adapters or tenants share nothing."""
    parts = (model, lora or "", cache_salt or "")
    text = "\0".join(f"{len(part)}:{part}" for part in parts)
    return xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) & _HASH


def block_hashes(token_ids: Sequence[int], block_size: int, parent: int) -> list[int]:
    """60-bit hashes of the full blocks, each XXH3 of its own tokens (32-bit, native order) seeded with its parent's.

    `parent` is `chain_seed(...)` or the hash of the block before the first token; a trailing partial block has none.
    The hashes mean something only among machines of one byte order.

    Raises:
        OverflowError: A token is negative or does not fit 32 bits.
        TypeError: A token is not an integer.
    """
    size = block_size * TOKEN_BYTES
    data = array(TOKEN_CODE, token_ids).tobytes()
    starts = range(0, len(data) - size + 1, size)
    return [parent := xxh3_64_intdigest(data[start : start + size], parent) & _HASH for start in starts]
