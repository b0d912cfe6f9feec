"""A researcher's command to running workers: who is told in which order, and when they take requests again.

A worker takes no requests from before a command that halts it until the command that undoes it has succeeded on every
node, and where several are told, until all have answered: none serves with new weights beside another with old ones,
which would read its KV. A command that failed on some nodes therefore leaves the worker without requests rather than
half one thing and half another; the command may be given again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

from backends.engine import Command, EngineError, Pause, Resume, Sleep, UpdateWeights, Wake

T = TypeVar("T")

HOLD_LIMIT_S = 30.0
"""How long a node that lives may take to note a hold; the others wait for it."""


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

    async def control(self, command: Command) -> bool:
        """Have its share of the engine carry it out; raises EngineError.

        Returns:
            Whether it takes requests; where it does not, another node answers for both.
        """
        ...


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


@dataclass(frozen=True, slots=True)
class Teller:
    """Carries commands out.

    Args:
        limit_s: how long a node may take for one.
        reason_of: an error's cause in one line.
    """

    limit_s: float
    reason_of: Callable[[BaseException], str] = str

    async def carry_out(self, command: Command, workers: Mapping[str, Sequence[Node]]) -> dict[str, str | None]:
        """Do it on all nodes of all these workers at once: the ranks of one step together, so none is told alone.

        Returns:
            By worker, None, or which of its nodes failed and why. Where every node that takes requests refused for
            good, nothing has changed there.
        """
        halted = await _each(workers, lambda _, nodes: self._ask(node.hold(halts(command)) for node in nodes))
        told = {name: nodes for name, nodes in workers.items() if not any(map(_is_error, halted[name]))}
        answers = await _each(told, lambda _, nodes: self._ask((node.control(command) for node in nodes), self.limit_s))

        def release(name: str, nodes: Sequence[Node]) -> Awaitable[list[BaseException | None]]:
            if not any(map(_is_error, answers[name])):
                return self._ask(node.unhold(undoes(command)) for node in nodes)
            if all(map(_changed_nothing, answers[name])):
                new = [holds for holds in halted[name] if not isinstance(holds, BaseException)]
                return self._ask(node.unhold(holds) for node, holds in zip(nodes, new, strict=True))
            return self._ask(())

        released = await _each(told, release)
        return {name: self._failure(halted[name], answers.get(name, ()), released.get(name, ())) for name in workers}

    async def _ask(self, calls: Iterable[Awaitable[T]], limit_s: float = HOLD_LIMIT_S) -> list[T | BaseException]:
        limited = (asyncio.wait_for(call, limit_s) for call in calls)
        return await asyncio.gather(*limited, return_exceptions=True)

    def _failure(self, *steps: Sequence[object]) -> str | None:
        """Of the first step that failed; nodes that say the same are named together."""
        for answers in steps:
            ranks: dict[str, list[str]] = {}
            for rank, answer in enumerate(answers):
                if isinstance(answer, TimeoutError):
                    ranks.setdefault("it did not answer in time", []).append(str(rank))
                elif isinstance(answer, BaseException):
                    ranks.setdefault(self.reason_of(answer), []).append(str(rank))
            if ranks:
                return "; ".join(f"node {', '.join(names)}: {reason}" for reason, names in ranks.items())
        return None


async def _each(
    workers: Mapping[str, Sequence[Node]], work: Callable[[str, Sequence[Node]], Awaitable[T]]
) -> dict[str, T]:
    answers = await asyncio.gather(*(work(name, nodes) for name, nodes in workers.items()))
    return dict(zip(workers, answers, strict=True))


def _is_error(answer: object) -> bool:
    return isinstance(answer, BaseException)


def _changed_nothing(answer: object) -> bool:
    """An engine refuses so what it cannot do; see `Engine.control`. Ray wraps what was raised elsewhere."""
    cause = getattr(answer, "cause", None) or answer
    return answer is False or (isinstance(cause, EngineError) and not cause.retryable)
