"""What every test gets: a marker from its folder, and an environment in which Ray asks for no token."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import settings

FOLDERS = ("unit", "integration", "e2e", "gpu", "contract")
"""In the order they run: the engines of contract tests take gigabytes, and live until the session ends."""

# Ray 2.60 otherwise turns token authentication on for a local cluster and writes a token into the home folder.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


# How long an example takes says more about the machine than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(getattr(pytest.mark, _folder(item)))
    items.sort(key=lambda item: FOLDERS.index(_folder(item)))


def _folder(item: pytest.Item) -> str:
    return Path(item.path).relative_to(Path(__file__).parent).parts[0]


@pytest.fixture(autouse=True)
def _unit_tests_stay_in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that opens a connection or starts Ray belongs elsewhere."""
    if request.node.get_closest_marker("unit") is not None:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a unit test must not open a network connection")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket.socket, "bind", refuse)
