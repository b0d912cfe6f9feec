"""What Ctrl-C does before and after a deployment is ready."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dynamo_ray.cli.interrupts import Interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers_as_in_a_terminal() -> Iterator[None]:
    """Whatever the tests were started under, nohup among it; as before at the end."""
    before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_it_is_ready_the_first_signal_interrupts(number: signal.Signals) -> None:
    Interrupts()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_once_ready_a_signal_only_ends_the_waiting_wherever_it_lands(number: signal.Signals) -> None:
    interrupts = Interrupts()
    interrupts.defer()
    assert not interrupts.wait(0.0)
    signal.raise_signal(number)
    assert interrupts.wait(60.0)


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts = Interrupts()
    signal.raise_signal(signal.SIGHUP)
    assert not interrupts.wait(0.0)
