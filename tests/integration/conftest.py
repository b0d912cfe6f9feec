"""What more than one file of these tests needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kv_ranks import NATS_TOKEN

from dynamo_ray.events.nats.server import PrivateServer, only_with


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateServer]:
    made = PrivateServer(tmp_path_factory.mktemp("nats") / "server", only_with(NATS_TOKEN))
    made.start()
    yield made
    made.stop()
