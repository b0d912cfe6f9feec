"""Commands to a running worker: who is told in which order, and what the worker is left as when it goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import get_args

import pytest

from backends.engine import Command, EngineError, Pause, Resume, Sleep, UpdateWeights, Wake
from dynamo_ray.cluster.commands import Hold, Teller, halts, undoes
from dynamo_ray.simulator import clock

LOAD = UpdateWeights("/weights")


class Node:
    """Records what it is told, and fails as told."""

    def __init__(self, failure: Exception | None = None, holds: frozenset[Hold] = frozenset()) -> None:
        self.failure, self.holds = failure, holds
        self.told: list[str] = []

    async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
        self.told.append("hold")
        new = holds - self.holds
        self.holds |= holds
        return new

    async def unhold(self, holds: frozenset[Hold]) -> None:
        self.told.append("unhold")
        self.holds -= holds

    async def control(self, command: Command) -> bool:
        self.told.append("control")
        if self.failure is not None:
            raise self.failure
        return True


class Follower(Node):
    """Served through its worker's first node."""

    async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
        return frozenset()

    async def control(self, command: Command) -> bool:
        return not await super().control(command)


class Remote(Exception):
    """As Ray wraps what was raised elsewhere."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


async def carry_out(command: Command, nodes: Sequence[Node]) -> str | None:
    """Of one worker; why it failed."""
    return (await Teller(limit_s=60.0).carry_out(command, {"w": nodes}))["w"]


REFUSED = EngineError("it has no command", retryable=False)


def test_every_command_that_halts_is_undone_by_another() -> None:
    commands: list[Command] = [Pause(), Resume(), Sleep(discard_weights=True), Wake(), LOAD]
    assert {type(command) for command in commands} == set(get_args(Command))
    halting = frozenset[Hold]().union(*map(halts, commands))
    assert halting == frozenset[Hold]().union(*map(undoes, commands)) == set(Hold)


@pytest.mark.parametrize(
    ("commands", "holds"),
    [
        ([Pause()], {Hold.PAUSED}),
        ([Pause(), Resume()], set()),
        ([Pause(), LOAD], {Hold.PAUSED}),
        ([LOAD], set()),
        ([Sleep()], {Hold.ASLEEP}),
        ([Sleep(), Wake()], set()),
        ([Pause(), Sleep(), Resume()], {Hold.ASLEEP}),
        ([Sleep(discard_weights=True), Wake()], {Hold.NO_WEIGHTS}),
        ([Sleep(discard_weights=True), Wake(), LOAD], set()),
        ([Resume(), Wake()], set()),
    ],
)
async def test_requests_come_again_when_all_that_halted_them_is_undone(
    commands: list[Command], holds: set[Hold]
) -> None:
    nodes = [Node(), Node()]
    for command in commands:
        assert await carry_out(command, nodes) is None
    assert [node.holds for node in nodes] == [holds, holds]


async def test_no_node_of_any_worker_is_told_before_all_take_no_requests_nor_takes_any_before_all_have_done_it() -> (
    None
):
    order: list[str] = []

    class Told(Node):
        async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
            order.append("hold")
            return await super().hold(holds)

        async def control(self, command: Command) -> bool:
            order.append("control")
            return True

        async def unhold(self, holds: frozenset[Hold]) -> None:
            order.append("unhold")

    answers = await Teller(limit_s=60.0).carry_out(LOAD, {"prefill-0": [Told(), Told()], "decode-0": [Told()]})
    assert answers == {"prefill-0": None, "decode-0": None}
    assert order == ["hold"] * 3 + ["control"] * 3 + ["unhold"] * 3


@pytest.mark.parametrize("command", [LOAD, Pause(), Sleep(), Sleep(discard_weights=True)])
@pytest.mark.parametrize(
    "failures",
    [(None, REFUSED), (EngineError("out of memory"),), (EngineError("out of memory"), REFUSED), (OSError("lost"),)],
    ids=["one refuses", "it fails", "one fails, one refuses", "a node is lost"],
)
async def test_what_is_half_done_takes_no_requests_until_it_is_done_whole(
    command: Command, failures: tuple[Exception | None, ...]
) -> None:
    nodes = [Node(failure) for failure in failures]
    assert await carry_out(command, nodes) is not None
    assert all(node.holds == halts(command) for node in nodes)
    for node in nodes:
        node.failure = None
    assert await carry_out(command, nodes) is None
    assert all(node.holds == halts(command) - undoes(command) for node in nodes)


@pytest.mark.parametrize("command", [LOAD, Pause(), Sleep(discard_weights=True), Resume()])
async def test_what_every_node_refuses_has_changed_nothing(command: Command) -> None:
    nodes = [Node(REFUSED, frozenset({Hold.PAUSED})), Node(Remote(REFUSED))]
    assert await carry_out(command, nodes) == "node 0, 1: it has no command"
    assert [node.holds for node in nodes] == [{Hold.PAUSED}, set()]


async def test_nodes_that_are_served_through_the_one_that_refuses_have_nothing_that_could_have_changed() -> None:
    leader, followers = Node(REFUSED), [Follower(), Follower()]
    assert await carry_out(Sleep(), [leader, *followers]) == "node 0: it has no command"
    assert not leader.holds
    leader.failure = None
    assert await carry_out(Sleep(), [leader, *followers]) is None
    assert leader.holds == {Hold.ASLEEP}
    followers[1].failure = OSError("its process died")
    assert await carry_out(LOAD, [leader, *followers]) == "node 2: its process died"
    assert leader.holds == {Hold.ASLEEP, Hold.LOADING}


async def test_an_undoing_command_that_fails_undoes_nothing() -> None:
    nodes = [Node(holds=frozenset({Hold.PAUSED})), Node(EngineError("stuck"), frozenset({Hold.PAUSED}))]
    assert await carry_out(Resume(), nodes) == "node 1: stuck"
    assert [node.holds for node in nodes] == [{Hold.PAUSED}] * 2


async def test_a_failure_names_its_nodes_and_those_that_say_the_same_together() -> None:
    missing = EngineError("there is no folder /weights", False, "path")
    nodes = [Node(missing), Node(OSError("its process died")), Node(missing)]
    failure = await carry_out(LOAD, nodes)
    assert failure == "node 0, 2: there is no folder /weights; node 1: its process died"


async def test_a_node_that_cannot_be_reached_is_told_nothing_more() -> None:
    class Lost(Node):
        async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
            raise OSError("its process died")

    nodes = [Node(), Lost()]
    assert await carry_out(LOAD, nodes) == "node 1: its process died"
    assert nodes[0].told == ["hold"], "its engine would wait for ranks that are gone"


async def test_a_worker_that_fails_keeps_no_other_from_its_requests() -> None:
    good, bad = Node(), Node(EngineError("out of memory"))
    answers = await Teller(limit_s=60.0).carry_out(LOAD, {"decode-0": [good], "decode-1": [bad]})
    assert answers == {"decode-0": None, "decode-1": "node 0: out of memory"}
    assert (good.holds, bad.holds) == (set(), {Hold.LOADING})


def test_a_node_that_does_not_answer_is_waited_for_no_longer_than_allowed() -> None:
    class Hangs(Node):
        async def control(self, command: Command) -> bool:
            await asyncio.sleep(1e9)
            return True

    async def main() -> None:
        nodes = [Node(), Hangs()]
        assert await carry_out(LOAD, nodes) == "node 1: it did not answer in time"
        assert asyncio.get_running_loop().time() < 61.0
        assert [node.holds for node in nodes] == [{Hold.LOADING}] * 2

    clock.run(main())
