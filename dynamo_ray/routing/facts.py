"""What the router is told of a worker."""

from __future__ import annotations

from dataclasses import dataclass

from backends.engine import HandoffStyle, Role
from dynamo_ray.routing.ranks import Holder


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the router has to know of a worker; never changes until it stops."""

    name: str
    epoch: int
    role: Role
    attn_dp_size: int
    """Its ranks are 0 to this."""
    block_size: int
    kv_total_blocks: int
    """Per rank."""
    lockstep_group: str = ""
    """Ranks of one group step together: all those of one engine, whatever endpoints serve them. Empty: `name`."""
    handoff: HandoffStyle = "none"
    caches_prefixes: bool = True
    tells_events: bool = True
    """It publishes KV events and we listen; else what it caches is guessed from what was sent there."""

    @property
    def holders(self) -> list[Holder]:
        return [Holder(self.name, self.epoch, rank) for rank in range(self.attn_dp_size)]

    @property
    def group(self) -> str:
        return self.lockstep_group or self.name
