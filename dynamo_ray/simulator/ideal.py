"""What the best possible cache would have found: one, with the capacity of all ranks together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.simulator.traces import TraceRequest, token_ids


def ideal_hit_tokens(trace: Sequence[TraceRequest], block_size: int, total_blocks: int) -> int:
    """Prompt tokens that one LRU cache of `total_blocks` has when each request comes; only their order matters.

    It is faster than any engine can be: a prompt is in it as soon as it has come, answers take no room, and what
    runs holds nothing. As engines do, it computes every prompt's last token.
    """
    prompts = tuple((request.block_ids, request.prompt_tokens) for request in trace)
    return _hit_tokens(prompts, block_size, total_blocks)


@lru_cache(maxsize=8)
def _hit_tokens(prompts: tuple[tuple[tuple[int, ...], int], ...], block_size: int, total_blocks: int) -> int:
    """Remembered, since policies are compared on the same trace."""
    cache: OrderedDict[int, None] = OrderedDict()
    seed, hits = chain_seed("ideal"), 0
    for block_ids, prompt_tokens in prompts:
        hashes = block_hashes(token_ids(block_ids, prompt_tokens), block_size, seed)
        found = 0
        while found < len(hashes) and hashes[found] in cache:
            found += 1
        hits += min(found, (prompt_tokens - 1) // block_size) * block_size
        # Deepest first, as engines free them: what is evicted is always the end of a chain.
        for block in reversed(hashes):
            cache.pop(block, None)
            cache[block] = None
        while len(cache) > total_blocks:
            cache.popitem(last=False)
    return hits
