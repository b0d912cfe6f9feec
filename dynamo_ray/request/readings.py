"""What one ingress process knows of the workers and of their caches, for /metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.engine import Role
from dynamo_ray.events.plane import EventPlane
from dynamo_ray.request.router import Router
from dynamo_ray.request.workers import Workers
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.telemetry import Reading


def of_workers(router: Router, workers: Workers, roles: Sequence[Role]) -> Iterator[Reading]:
    for holder, load in router.table.reported().items():
        labels = _labels(holder)
        yield "dynamo_ray_worker_running_requests", "Requests that step", labels, load.num_running
        yield "dynamo_ray_worker_waiting_requests", "Requests that wait inside", labels, load.num_waiting
        yield "dynamo_ray_worker_kv_used_blocks", "KV blocks that requests hold", labels, load.kv_used_blocks
        yield "dynamo_ray_worker_kv_total_blocks", "KV blocks there are", labels, load.kv_total_blocks
    for holder, count in router.num_legs.items():
        yield "dynamo_ray_routed_legs", "Legs sent to a rank of a live worker", _labels(holder), count
    for role in roles:
        halted = workers.paused(role)
        for worker in (*halted, *(connection.info.worker for connection in workers.of_role(role))):
            yield "dynamo_ray_worker_paused", "Halted by a command", {"worker": worker}, worker in halted


def of_index(router: Router, events: EventPlane) -> Iterator[Reading]:
    index = router.index
    yield "dynamo_ray_index_blocks", "Distinct blocks in the KV index", {}, index.num_blocks
    yield "dynamo_ray_index_orphan_blocks_total", "Blocks whose parent was unknown", {}, index.orphan_blocks
    yield "dynamo_ray_kv_event_gaps_total", "Gaps seen in KV events", {}, events.num_gaps
    for (anomaly, source), count in index.anomalies.counts.items():
        labels = {"kind": anomaly, "source": source}
        yield "dynamo_ray_kv_event_anomalies_total", "What was wrong with KV events", labels, count
    for holder in index.doubtful:
        what = "KV events were lost: only what was told since counts"
        yield "dynamo_ray_index_doubtful", what, _labels(holder), True
    for worker, guessed in router.chooser.guessed().items():
        labels = {"worker": worker}
        yield "dynamo_ray_index_approximate", "What it caches is guessed from what was sent there", labels, guessed
    yield "dynamo_ray_policy_errors_total", "Legs that the policy could not place", {}, router.chooser.num_policy_errors


def _labels(holder: Holder) -> dict[str, str]:
    return {"worker": holder.worker, "dp_rank": str(holder.dp_rank)}
