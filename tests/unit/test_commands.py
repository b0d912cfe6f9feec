"""Commands to a running worker: who is told in which order, and what the worker is left as when it goes wrong."""

from __future__ import annotations

from typing import get_args

import pytest

from backends.engine import Command, EngineError, Pause, Resume, Sleep, UpdateWeights, Wake
from dynamo_ray.cluster.commands import CommandError, Hold, carry_out, halts, undoes

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

    async def control(self, command: Command) -> None:
        self.told.append("control")
        if self.failure is not None:
            raise self.failure


class Remote(Exception):
    """As Ray wraps what was raised elsewhere."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


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
        await carry_out(command, nodes)
    assert [node.holds for node in nodes] == [holds, holds]


async def test_no_node_is_told_before_all_of_them_take_no_requests_nor_takes_any_before_all_have_done_it() -> None:
    order: list[str] = []

    class Told(Node):
        async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
            order.append("hold")
            return await super().hold(holds)

        async def control(self, command: Command) -> None:
            order.append("control")

        async def unhold(self, holds: frozenset[Hold]) -> None:
            order.append("unhold")

    await carry_out(LOAD, [Told(), Told(), Told()])
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
    with pytest.raises(CommandError):
        await carry_out(command, nodes)
    assert all(node.holds == halts(command) for node in nodes)
    for node in nodes:
        node.failure = None
    await carry_out(command, nodes)
    assert all(node.holds == halts(command) - undoes(command) for node in nodes)


@pytest.mark.parametrize("command", [LOAD, Pause(), Sleep(discard_weights=True), Resume()])
async def test_what_every_node_refuses_has_changed_nothing(command: Command) -> None:
    nodes = [Node(REFUSED, frozenset({Hold.PAUSED})), Node(Remote(REFUSED))]
    with pytest.raises(CommandError, match="it has no command"):
        await carry_out(command, nodes)
    assert [node.holds for node in nodes] == [{Hold.PAUSED}, set()]


async def test_an_undoing_command_that_fails_undoes_nothing() -> None:
    nodes = [Node(holds=frozenset({Hold.PAUSED})), Node(EngineError("stuck"), frozenset({Hold.PAUSED}))]
    with pytest.raises(CommandError, match="node 1: stuck"):
        await carry_out(Resume(), nodes)
    assert [node.holds for node in nodes] == [{Hold.PAUSED}] * 2


async def test_a_failure_names_its_nodes_and_those_that_say_the_same_together() -> None:
    missing = EngineError("there is no folder /weights", False, "path")
    nodes = [Node(missing), Node(OSError("its process died")), Node(missing)]
    with pytest.raises(CommandError) as failed:
        await carry_out(LOAD, nodes)
    assert str(failed.value) == "node 0, 2: there is no folder /weights; node 1: its process died"


async def test_a_node_that_cannot_be_reached_is_told_nothing_more() -> None:
    class Lost(Node):
        async def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
            raise OSError("its process died")

    nodes = [Node(), Lost()]
    with pytest.raises(CommandError, match="node 1: its process died"):
        await carry_out(LOAD, nodes)
    assert nodes[0].told == ["hold"], "its engine would wait for ranks that are gone"
