"""What only the simulated engine can get wrong: its own sockets."""

from __future__ import annotations

import gc

import pytest
from engines import spec

from backends.engine import EngineStartError, NodePlace, Role
from backends.simulated import SimulatedEngine


async def test_an_address_that_is_not_this_nodes_is_a_failed_start_that_leaves_nothing() -> None:
    for kv_events in (True, False):
        engine = SimulatedEngine(
            spec("simulated", Role.PREFILL, nodes=(NodePlace("203.0.113.1"),), kv_events=kv_events)
        )
        with pytest.raises(EngineStartError, match=r"203\.0\.113\.1"):
            await engine.start()
        await engine.stop()
    gc.collect()  # warns of a socket or context that is still open
