"""`events: nats` without a URL: two ingresses that learn of the workers' caches by a private nats-server alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import nats
import psutil
import pytest
import yaml
from deployments import ROOT, Deployment, up, wait_until

from dynamo_ray.cli import processes
from dynamo_ray.cli.local_nats import TOKEN_VARIABLE
from dynamo_ray.events.nats import wire

MODEL = "byte-tokenizer"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("nats")
    document = yaml.safe_load((ROOT / "configs/local-sim.yaml").read_text())
    application = document["applications"][0]
    application["args"]["events"] = "nats"
    application["args"]["decode"]["replicas"] = 1  # prefill is where prefixes are looked for
    application["deployments"][0]["num_replicas"] = 2
    config = folder / "local-nats.yaml"
    config.write_text(yaml.safe_dump(document))
    with up(config, MODEL, folder / "up.log") as running:
        mark = server(running).environ()[processes.VARIABLE]
        yield running
    assert processes.started_by(mark) == []


def server(deployment: Deployment) -> psutil.Process:
    return next(p for p in deployment.descendants() if p.name() == "nats-server")


async def heard(deployment: Deployment, subject: str) -> list[wire.Message]:
    """What the stream keeps on that subject."""
    process = server(deployment)
    port = next(c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN)
    token = next(p.environ()[TOKEN_VARIABLE] for p in deployment.descendants() if TOKEN_VARIABLE in p.environ())
    client = await nats.connect(f"nats://127.0.0.1:{port}", token=token)
    try:
        subscription = await client.jetstream().subscribe(subject, stream="dynamo_ray-local-sim", ordered_consumer=True)
        found: list[wire.Message] = []
        while True:
            try:
                found.append(wire.decode((await subscription.next_msg(timeout=0.5)).data))
            except nats.errors.TimeoutError:
                return found
    finally:
        await client.close()


def turns(deployment: Deployment, topic: str) -> list[int]:
    """Prompt tokens that were cached, of four second turns after one first."""
    first: list[dict[str, Any]] = [{"role": "user", "content": f"tell me about {topic} " * 20}]
    answer = deployment.converse(first, max_tokens=20, temperature=0)
    second = [*first, answer["choices"][0]["message"], {"role": "user", "content": "and more?"}]
    time.sleep(0.5)  # an event, and no request of ours to wait for
    found = [deployment.converse(second, max_tokens=1, temperature=0) for _ in range(4)]
    return [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]


def test_requests_go_where_their_prefix_is_before_and_after_the_server_is_killed(deployment: Deployment) -> None:
    assert deployment.metric("dynamo_ray_nats_connected") == 1
    assert min(turns(deployment, "rivers")) >= 400
    states = asyncio.run(heard(deployment, "dynamo_ray.local-sim.lifecycle.>"))
    assert {state.phase for state in states if isinstance(state, wire.Lifecycle)} >= {"ready"}
    said = asyncio.run(heard(deployment, "dynamo_ray.local-sim.kv.>"))
    stored = [event for m in said if isinstance(m, wire.Events) for event in m.events if isinstance(event, wire.Stored)]
    assert sum(len(event.block_hashes) for event in stored) > 10
    assert deployment.metric("dynamo_ray_peer_replicas") == 1
    killed = server(deployment)
    killed.kill()
    for request in range(20):
        assert deployment.complete(f"request {request}", max_tokens=3)["choices"][0]["text"]
    assert min(turns(deployment, "rivers")) >= 400  # what was known still is
    wait_until(lambda: "died and was started again" in deployment.log.read_text(), 10, "it is said")
    assert server(deployment) != killed
    wait_until(lambda: deployment.metric("dynamo_ray_nats_connections_total") >= 2, 10, "an ingress is back on it")
    wait_until(lambda: min(turns(deployment, "seas")) >= 400, 10, "what is said since is known")
