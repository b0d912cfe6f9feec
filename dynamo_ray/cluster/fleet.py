"""Does what the supervisor orders: every method carries out one instruction and returns the event that answers it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from backends.engine import Command
from dynamo_ray.cluster import gang as gangs
from dynamo_ray.cluster import model_check
from dynamo_ray.cluster.commands import Teller
from dynamo_ray.cluster.gang import Gang, group_name
from dynamo_ray.cluster.lifecycle import (
    Adopted,
    Died,
    Drained,
    Gone,
    GroupLost,
    Health,
    NotReserved,
    Progress,
    Released,
    Reserved,
    Started,
)
from dynamo_ray.cluster.memory import Memory
from dynamo_ray.cluster.node import Assignment, Description
from dynamo_ray.cluster.workload import works
from dynamo_ray.config import DeploymentConfig
from placement import reserve
from placement.plan import PlacementError, WorkerPlacement, place
from placement.reserve import Reservation, ReservationError
from placement.topology import TopologyError

log = logging.getLogger("ray.serve")

HEALTH_TIMEOUT_S = 10.0
LEASE_TIMEOUT_S = 60.0


class Fleet:
    """The groups and actors of one application, by worker."""

    def __init__(self, app: str, config: DeploymentConfig, memory: Memory, secret: bytes) -> None:
        self.works = works(config)
        self.gangs: dict[str, Gang] = {}
        self._app, self._config, self._memory, self._secret = app, config, memory, secret
        self._placements: dict[str, WorkerPlacement] = {}
        self._reservations: dict[str, Reservation] = {}
        self._starts: dict[str, asyncio.Task[Started | Died | GroupLost]] = {}
        self._reserving = asyncio.Lock()
        self._controlling = asyncio.Lock()

    async def adopt(self) -> list[Adopted]:
        """Keep the whole gangs that still match; drain and end every other actor and group of this application."""
        nodes = await gangs.find(self._app)
        groups = await reserve.find(f"{self._app}/")
        for worker, actors in nodes.items():
            work, reservation = self.works.get(worker), groups.get(group_name(self._app, worker))
            gang = gangs.adopt(actors, work) if work is not None and reservation is not None else None
            if gang is not None and reservation is not None:
                log.info("adopting %s epoch %d", worker, gang.epoch)
                self.gangs[worker], self._reservations[worker] = gang, reservation
                self._placements[worker] = gang.placement
        await asyncio.gather(*(self._retire(worker, nodes[worker]) for worker in nodes if worker not in self.gangs))
        kept = {group_name(self._app, worker) for worker in self.gangs}
        await asyncio.gather(*(reserve.release(name) for name in groups if name not in kept))
        return [Adopted(gang.worker, gang.epoch, gang.endpoints) for gang in self.gangs.values()]

    async def reserve(self, worker: str) -> Reserved | NotReserved:
        async with self._reserving:  # one after the other: each must see what the one before took
            busy: dict[str, tuple[int, ...]] = {}
            for placement in self._placements.values():
                for bundle in placement.bundles:
                    busy[bundle.node_id] = busy.get(bundle.node_id, ()) + bundle.cores
            try:
                topology = await asyncio.to_thread(reserve.observe, busy, self._config.placement.leaf_label)
                placement = place(topology, self.works[worker].group, worker, self._placements)
                lacks = await model_check.problem(self._config, self.works[worker], placement)
                if lacks is not None:
                    return NotReserved(worker, lacks)
                name = group_name(self._app, worker)
                self._reservations[worker] = await reserve.reserve(name, placement)
            except (PlacementError, ReservationError, TopologyError) as error:
                return NotReserved(worker, str(error))
            self._placements[worker] = placement
        return Reserved(worker)

    async def start(self, worker: str, epoch: int, progress: Callable[[Progress], None]) -> Started | Died | GroupLost:
        task = self._starts[worker] = asyncio.ensure_future(self._start(worker, epoch, progress))
        try:
            return await task
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            return Died(worker, epoch, "its start was called off")

    async def _start(self, worker: str, epoch: int, progress: Callable[[Progress], None]) -> Started | Died | GroupLost:
        if worker in await self.lost_groups():
            return GroupLost(worker, "a node of its placement group is lost")
        await asyncio.to_thread(self._memory.remember_epoch, worker, epoch)
        try:
            gang = self.gangs[worker] = await gangs.start(
                self._config,
                self.works[worker],
                self._assignments(worker, epoch),
                self._reservations[worker],
                self._placements[worker],
                self._secret,
                lambda detail: progress(Progress(worker, epoch, detail)),
            )
        except (gangs.GangError, ValueError) as error:
            return Died(worker, epoch, str(error))
        return Started(worker, epoch, gang.endpoints)

    async def watch(self, worker: str, epoch: int) -> Died:
        """Answers when any rank of that gang is dead."""
        return Died(worker, epoch, await self.gangs[worker].watch())

    async def check(self, worker: str, epoch: int) -> Health:
        gang = self.gangs.get(worker)
        if gang is None or gang.epoch != epoch:
            return Health(worker, epoch, "it is not running")
        return await gang.renew(HEALTH_TIMEOUT_S)

    async def drain(self, worker: str, epoch: int) -> Drained:
        gang = self.gangs.get(worker)
        if gang is not None:
            await gang.drain(self._config.limits.drain_timeout_s)
        return Drained(worker, epoch)

    async def control(self, command: Command, target: str | None, limit_s: float) -> dict[str, str | None]:
        """Carry a command out on a worker, on a role's workers, or on all; why it failed, by worker."""
        workers = [worker for worker, work in self.works.items() if target in (None, worker, work.role)]
        async with self._controlling:  # one after the other: each must see what the one before made of it
            nodes = {worker: self.gangs[worker].nodes for worker in workers if worker in self.gangs}
            answers = await Teller(limit_s, gangs.reason_of).carry_out(command, nodes)
        away = "it does not run; when it starts, it takes requests, with the configuration's weights"
        return {worker: answers.get(worker, away) for worker in workers}

    async def kill(self, worker: str, epoch: int) -> Gone:
        starting = self._starts.pop(worker, None)
        if starting is not None:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        self.gangs.pop(worker, None)
        await gangs.kill(self._app, worker)
        return Gone(worker, epoch)

    async def release(self, worker: str) -> Released:
        await reserve.release(group_name(self._app, worker))
        self._placements.pop(worker, None)
        self._reservations.pop(worker, None)
        return Released(worker)

    async def lost_groups(self) -> list[str]:
        """Workers whose reservation no longer holds all its nodes."""
        groups = await reserve.find(f"{self._app}/")
        return [worker for worker in list(self._reservations) if groups.get(group_name(self._app, worker)) is None]

    def _assignments(self, worker: str, epoch: int) -> tuple[Assignment, ...]:
        return tuple(
            Assignment(
                app=self._app,
                worker=worker,
                epoch=epoch,
                config_hash=self.works[worker].config_hash,
                group=group_name(self._app, worker),
                bundle=bundle,
                lease_timeout_s=LEASE_TIMEOUT_S,
            )
            for bundle in self._placements[worker].bundles
        )

    async def _retire(self, worker: str, nodes: list[tuple[gangs.Actor, Description | None]]) -> None:
        """End a worker of an earlier configuration, after what it is busy with."""
        log.info("ending %s: it is not what the configuration asks for, or not whole", worker)
        answering = [actor for actor, description in nodes if description is not None]
        await gangs.drain(answering, self._config.limits.drain_timeout_s)
        await gangs.kill(self._app, worker)
