"""`dynamo-ray control`: what its options become, and whom it finds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from backends.engine import Command, Pause, Resume, Sleep, UpdateWeights, Wake
from dynamo_ray.cli import control, state
from dynamo_ray.cli.control import Order, command_of
from dynamo_ray.errors import ConfigError, ControlError, PreflightError

GIVEN: dict[str, Any] = {"path": None, "abort": False, "discard_weights": False}


@pytest.mark.parametrize(
    ("order", "options", "command"),
    [
        (Order.PAUSE, {}, Pause()),
        (Order.PAUSE, {"abort": True}, Pause(abort=True)),
        (Order.RESUME, {}, Resume()),
        (Order.SLEEP, {}, Sleep()),
        (Order.SLEEP, {"discard_weights": True}, Sleep(discard_weights=True)),
        (Order.WAKE, {}, Wake()),
        (Order.UPDATE_WEIGHTS, {"path": "/w"}, UpdateWeights("/w")),
    ],
)
def test_every_order_becomes_its_command(order: Order, options: dict[str, Any], command: Command) -> None:
    assert command_of(order, **{**GIVEN, **options}) == command


@pytest.mark.parametrize(
    ("order", "options", "option"),
    [
        (Order.UPDATE_WEIGHTS, {}, "--path"),
        (Order.PAUSE, {"path": "/w"}, "--path"),
        (Order.RESUME, {"abort": True}, "--abort"),
        (Order.WAKE, {"discard_weights": True}, "--discard-weights"),
    ],
)
def test_an_option_that_is_missing_or_of_another_order_is_refused(
    order: Order, options: dict[str, Any], option: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        command_of(order, **{**GIVEN, **options})
    assert [problem.field for problem in refused.value.problems] == [option]


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two `up`s that both serve `sim`, and what one of them says its Ray asks for."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "unset")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    ticks = state.started_ticks(os.getpid())
    assert ticks is not None
    entries = [
        state.Running(os.getpid(), ticks, "http://x", port, "c", f"ray:{port}", ("sim",), mark=str(tmp_path))
        for port in (8000, 8001)
    ]
    monkeypatch.setattr(state, "running", lambda: entries)
    return tmp_path


def test_an_application_of_several_ups_is_told_by_its_port(running: Path) -> None:
    with pytest.raises(PreflightError, match=r"say --port; running: sim on port 8000, sim on port 8001"):
        control._address_of("sim", None)
    assert control._address_of("sim", 8001) == "ray:8001"
    with pytest.raises(PreflightError, match="nothing of that name"):
        control._address_of("sim", 8002)


def test_a_private_ray_is_joined_with_its_own_token(running: Path) -> None:
    control._address_of("sim", 8000)
    assert os.environ["RAY_AUTH_TOKEN"] == "unset", "that one asks for none"
    state.keep_ray_token(str(running), "secret")
    control._address_of("sim", 8000)
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("token", "secret")


def test_a_process_that_is_joined_to_no_ray_is_told_so_and_starts_none() -> None:
    with pytest.raises(ControlError, match="joined to no Ray"):
        control.control("sim", Pause())


@pytest.mark.parametrize("wrong", ["pause", Pause])
def test_what_is_no_command_is_refused_before_any_worker_hears_of_it(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?i)command: .*pause.* is none; give Pause\(\), Resume\(\)"):
        control.control("sim", wrong)
