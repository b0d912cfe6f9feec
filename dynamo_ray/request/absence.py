"""Roles that have no worker at the moment: since when, and whether requests wait for another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from backends.engine import Role
from dynamo_ray.request.workers import Workers

log = logging.getLogger(__name__)


class Absence:
    """Says for each role whether requests wait while it has no worker: for `wait_s` after its last one was lost.

    A role that never had one is not waited for, as nobody knows how long it takes. `over` is called when a wait ends.
    """

    def __init__(self, workers: Workers, roles: Collection[Role], wait_s: float, over: Callable[[], None]) -> None:
        self._workers, self._roles = workers, roles
        self._wait_s, self._over = wait_s, over
        self._waits: dict[Role, asyncio.TimerHandle] = {}
        """Until when each that has none is waited for."""
        self._given_up = set(roles)

    def came(self, role: Role) -> None:
        """It has a worker."""
        self._given_up.discard(role)
        timer = self._waits.pop(role, None)
        if timer is not None:
            timer.cancel()

    def went(self, role: Role) -> None:
        """It has one fewer."""
        if role not in self._waits and role not in self._given_up and not self._workers.of_role(role):
            self._begin(role)

    def awaited(self, waiting: bool) -> bool:
        """Whether a request may wait for every role that has no worker.

        Args:
            waiting: it does already; then also for workers that a command has halted.
        """
        for role in self._roles:
            if role in self._waits or self._workers.of_role(role):
                continue
            if role not in self._given_up and self._workers.paused(role):
                if not waiting:
                    return False
                continue
            self.went(role)  # its last worker drains, and lives
            if role in self._given_up:
                return False
        return True

    def _begin(self, role: Role) -> None:
        log.warning("no %s worker is left; requests that need one wait for another, at most %g s", role, self._wait_s)
        if self._wait_s:
            self._waits[role] = asyncio.get_running_loop().call_later(self._wait_s, self._end, role)
        else:
            self._given_up.add(role)

    def _end(self, role: Role) -> None:
        del self._waits[role]
        self._given_up.add(role)
        self._over()
