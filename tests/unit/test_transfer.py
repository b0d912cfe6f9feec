"""What a client is told of a request whose prompt was computed by one worker and answered by another."""

from __future__ import annotations

from typing import Any, cast

from backends.engine import KVHandoff, TokenChunk
from dynamo_ray.request.transfer import Transfer


def transfer(**told: Any) -> Transfer:
    nowhere = cast(Any, None)
    return Transfer(KVHandoff({}), nowhere, nowhere, **told)


def test_what_prefill_had_cached_stands_in_place_of_what_decode_had() -> None:
    whole = transfer(cached_tokens=64, engine_s=0.5).both(TokenChunk("r", [1], cached_tokens=3, engine_s=0.25))
    assert (whole.cached_tokens, whole.engine_s) == (64, 0.75)


def test_the_engines_times_add_up_where_decode_does_not_say_what_it_had_cached() -> None:
    whole = transfer(cached_tokens=64, engine_s=0.5).both(TokenChunk("r", [1], engine_s=0.25))
    assert (whole.cached_tokens, whole.engine_s) == (None, 0.75)


def test_later_chunks_are_as_decode_sent_them() -> None:
    later = TokenChunk("r", [1, 2], "stop")
    assert transfer(cached_tokens=64, engine_s=0.5).both(later) is later
