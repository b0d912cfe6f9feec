"""Ports that are ours before anything listens on them."""

from __future__ import annotations

import pytest

from dynamo_ray.cli import local_ray
from dynamo_ray.cluster import ports


def test_nobody_who_asks_is_given_ports_that_another_has_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "PORT_RANGE", range(28_990, 28_997))  # room for one block of four
    with ports.reserve_ports("127.0.0.1", 4) as block:
        assert list(block.ports) == list(range(block.ports[0], block.ports[0] + 4))
        with pytest.raises(OSError, match="no 4 consecutive free ports"):
            ports.reserve_ports("127.0.0.1", 4)
    with ports.reserve_ports("127.0.0.1", 4) as again:
        assert len(again.ports) == 4


def test_serves_ports_are_none_that_the_kernel_gives_to_whoever_asks_for_any() -> None:
    linux_gives = range(32_768, 61_000)  # by default (ip_local_port_range)
    with local_ray.reserve_serve_ports() as one, local_ray.reserve_serve_ports() as other:
        assert not {*one.ports} & {*other.ports, *linux_gives}
