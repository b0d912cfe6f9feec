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
    first_tokens: int = 0
    """Of tries; each had a time to first token predicted when its ranks were chosen."""
    predicted_s: float = 0.0
    observed_s: float = 0.0
    error_s: float = 0.0
    """By how much those differ, over or under."""
    timed_batches: int = 0
    """KV events whose publisher says when."""
    lag_s: float = 0.0
    """From then until they were in the index, by both machines' clocks; 0 where the publisher's is ahead."""

    def took(self, choice: Choice) -> None:
        computes = choice.prefill or choice.decode
        self.decisions += 1
        self.predicted_cached_tokens += computes.leg.prompt_tokens - computes.uncached_tokens
        self.without_prefill_worker += choice.prefill is None

    def observed(self, predicted_s: float, observed_s: float) -> None:
        """A try's first token has come, so many seconds after its ranks were chosen."""
        self.first_tokens += 1
        self.predicted_s += predicted_s
        self.observed_s += observed_s
        self.error_s += abs(observed_s - predicted_s)

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
        yield "dynamo_ray_first_tokens_total", "Tries at a request whose first token came", {}, self.first_tokens
        for name, what, value in (
            ("predicted", "Time to first token from the choice on, as predicted then", self.predicted_s),
            ("observed", "The same, as it came", self.observed_s),
            ("error", "How far prediction and observation are apart", self.error_s),
        ):
            yield f"dynamo_ray_ttft_{name}_seconds_total", what, {}, value
        yield "dynamo_ray_kv_event_timed_batches_total", "KV event batches that say when", {}, self.timed_batches
        yield "dynamo_ray_kv_event_lag_seconds_total", "From then until they were in the index", {}, self.lag_s
