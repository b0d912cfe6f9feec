"""What a router counts, for /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from backends.kv_events import KVEventBatch
from dynamo_ray.routing.chooser import Choice
from dynamo_ray.telemetry import Reading


@dataclass(slots=True)
class Tally:
    """Sums since the process began."""

    decisions: int = 0
    """Pairs of ranks that were taken, one for every try at a request."""
    without_prefill_worker: int = 0
    """Or on an aggregated worker."""
    predicted_cached_tokens: int = 0
    retries: int = 0
    timed_batches: int = 0
    """KV events whose publisher says when."""
    lag_s: float = 0.0
    """From then until they were in the index, by both machines' clocks; 0 where the publisher's is ahead."""

    def took(self, choice: Choice) -> None:
        computes = choice.prefill or choice.decode
        self.decisions += 1
        self.predicted_cached_tokens += computes.leg.prompt_tokens - computes.uncached_tokens
        self.without_prefill_worker += choice.prefill is None

    def heard(self, batch: KVEventBatch) -> None:
        if batch.published_unix_s is not None:
            self.timed_batches += 1
            self.lag_s += max(0.0, time.time() - batch.published_unix_s)

    def readings(self) -> Iterator[Reading]:
        yield "dynamo_ray_decisions_total", "Times that ranks were chosen for a request", {}, self.decisions
        yield (
            "dynamo_ray_predicted_cached_tokens_total",
            "Prompt tokens that the chosen rank was thought to have cached",
            {},
            self.predicted_cached_tokens,
        )
        what = "Prompts that whoever generates the answer computes, without a prefill worker"
        yield "dynamo_ray_prompts_without_prefill_worker_total", what, {}, self.without_prefill_worker
        yield "dynamo_ray_retries_total", "Requests moved to other workers", {}, self.retries
        yield "dynamo_ray_kv_event_timed_batches_total", "KV event batches that say when", {}, self.timed_batches
        yield "dynamo_ray_kv_event_lag_seconds_total", "From then until they were in the index", {}, self.lag_s
