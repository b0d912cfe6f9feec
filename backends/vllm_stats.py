"""What one vLLM rank says about itself after every step, reduced to the load and a few running totals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends.engine import RankLoad


@dataclass(slots=True)
class EngineCounters:
    """Running totals of one engine, all ranks, since it started."""

    computed_tokens: int = 0
    """Prompt tokens computed here."""
    cached_tokens: int = 0
    """Prompt tokens found in this engine's prefix cache."""
    transferred_tokens: int = 0
    """Prompt tokens whose KV came from a prefill engine."""
    transferred_bytes: int = 0
    transfers: int = 0
    failed_transfers: int = 0


class RankRecorder:
    """One rank's stat logger, in the shape vLLM's StatLoggerBase has (vllm.v1.metrics.loggers)."""

    def __init__(self, rank: int, counters: EngineCounters) -> None:
        self.rank = rank
        self.counters = counters
        self.num_running = 0
        self.num_waiting = 0
        self.kv_usage = 0.0

    def load(self, kv_total_blocks: int) -> RankLoad:
        used = round(self.kv_usage * kv_total_blocks)
        return RankLoad(self.rank, self.num_running, self.num_waiting, used, kv_total_blocks)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.num_running = scheduler_stats.num_running_reqs
            self.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            self._count_transfers(scheduler_stats.kv_connector_stats or {})
        if iteration_stats is not None:
            prompt = iteration_stats.prompt_token_stats
            self.counters.computed_tokens += prompt.computed
            self.counters.cached_tokens += prompt.local_cache_hit
            self.counters.transferred_tokens += prompt.external_kv_transfer

    def _count_transfers(self, stats: dict[str, Any]) -> None:
        sizes = stats.get("bytes_transferred", ())
        self.counters.transferred_bytes += int(sum(sizes))
        self.counters.transfers += len(sizes)
        for kind in ("num_failed_transfers", "num_failed_handshakes"):
            self.counters.failed_transfers += len(stats.get(kind, ()))

    def log_engine_initialized(self) -> None:
        """Nothing to say: the node's actor reports that the engine is ready."""

    def log(self) -> None:
        """Nothing to print."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Nothing to note: who sends it to sleep knows."""
