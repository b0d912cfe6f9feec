"""Where a Serve listens, as its own options say."""

from __future__ import annotations

import pytest
from ray.serve.config import HTTPOptions

from dynamo_ray.cli.serving import root_url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8123"),
        ("0.0.0.0", "http://10.0.0.9:8123"),
        ("::", "http://10.0.0.9:8123"),
        ("::1", "http://[::1]:8123"),
    ],
)
def test_a_url_has_a_host_that_can_be_reached(host: str, url: str) -> None:
    assert root_url(HTTPOptions(host=host, port=8123), "10.0.0.9") == url
