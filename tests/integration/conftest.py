"""What more than one file of these tests needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kv_ranks import NATS_TOKEN

from dynamo_ray.events.nats.server import PrivateServer, only_with


@pytest.fixture
def nats_server(one_nats_server: PrivateServer) -> PrivateServer:
    """Running, whatever the last test has done to it."""
    if not one_nats_server.is_running:
        one_nats_server.start()
    return one_nats_server


@pytest.fixture(scope="session")
def one_nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    made = PrivateServer(tmp_path_factory.mktemp("nats") / "server", only_with(NATS_TOKEN))
    made.start()
    yield made
    made.stop()
