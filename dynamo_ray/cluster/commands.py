"""A researcher's command to a running worker: who is told in which order, and when it takes requests again.

A worker takes no requests from before a command that halts it until the command that undoes it has succeeded on every
node. A command that failed on some nodes therefore leaves it without requests rather than half one thing and half
another; the command may be given again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import StrEnum
from typing import Protocol, TypeVar

from backends.engine import Command, EngineError, Pause, Resume, Sleep, UpdateWeights, Wake

T = TypeVar("T")


class Hold(StrEnum):
    """Why a worker takes no requests, as a predicate of its name."""

    PAUSED = "is paused"
    ASLEEP = "is asleep"
    LOADING = "loads weights, or has failed to"
    NO_WEIGHTS = "has dropped its weights"


class Node(Protocol):
    """One of a worker's nodes, wherever it runs."""

    async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
        """Take no requests for these reasons too; returns those that are new."""
        ...

    async def unhold(self, holds: frozenset[Hold]) -> None:
        """These reasons are no more."""
        ...

    async def control(self, command: Command) -> None:
        """Have its share of the engine carry it out; raises EngineError."""
        ...


class CommandError(Exception):
    """A worker did not do as told; says which node and why."""


def halts(command: Command) -> frozenset[Hold]:
    """What keeps requests away from before the command on."""
    match command:
        case Pause():
            return frozenset({Hold.PAUSED})
        case Sleep(discard_weights):
            return frozenset({Hold.ASLEEP, Hold.NO_WEIGHTS} if discard_weights else {Hold.ASLEEP})
        case UpdateWeights():
            return frozenset({Hold.LOADING})
        case _:
            return frozenset()


def undoes(command: Command) -> frozenset[Hold]:
    """What no longer keeps requests away once the command has succeeded."""
    match command:
        case Resume():
            return frozenset({Hold.PAUSED})
        case Wake():
            return frozenset({Hold.ASLEEP})
        case UpdateWeights():
            return frozenset({Hold.LOADING, Hold.NO_WEIGHTS})
        case _:
            return frozenset()


def empties_caches(command: Command) -> bool:
    """Whether no prompt computed before is found again after it."""
    return isinstance(command, Sleep | UpdateWeights)


async def carry_out(command: Command, nodes: Sequence[Node], reason_of: Callable[[BaseException], str] = str) -> None:
    """Do it on all of a worker's nodes at once: its ranks step together, so none can be told alone.

    Raises:
        CommandError: Not on all of them. Where every node refused it for good, nothing has changed.
    """
    new = await _all([node.hold(halts(command)) for node in nodes], reason_of)
    answers = await asyncio.gather(*(node.control(command) for node in nodes), return_exceptions=True)
    failed = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, BaseException)}
    if not failed:
        await _all([node.unhold(undoes(command)) for node in nodes], reason_of)
        return
    if len(failed) == len(nodes) and all(_changed_nothing(error) for error in failed.values()):
        await _all([node.unhold(holds) for node, holds in zip(nodes, new, strict=True)], reason_of)
    raise CommandError(_failure(failed.items(), reason_of))


def _changed_nothing(error: BaseException) -> bool:
    """An engine refuses so what it cannot do; see `Engine.control`. Ray wraps what was raised elsewhere."""
    cause = getattr(error, "cause", None) or error
    return isinstance(cause, EngineError) and not cause.retryable


async def _all(calls: Iterable[Awaitable[T]], reason_of: Callable[[BaseException], str]) -> list[T]:
    answers = await asyncio.gather(*calls, return_exceptions=True)
    done = [answer for answer in answers if not isinstance(answer, BaseException)]
    if len(done) < len(answers):
        failed = ((rank, answer) for rank, answer in enumerate(answers) if isinstance(answer, BaseException))
        raise CommandError(_failure(failed, reason_of))
    return done


def _failure(failed: Iterable[tuple[int, BaseException]], reason_of: Callable[[BaseException], str]) -> str:
    """Nodes that say the same are named together."""
    ranks: dict[str, list[str]] = {}
    for rank, error in failed:
        ranks.setdefault(reason_of(error), []).append(str(rank))
    return "; ".join(f"node {', '.join(names)}: {reason}" for reason, names in ranks.items())
