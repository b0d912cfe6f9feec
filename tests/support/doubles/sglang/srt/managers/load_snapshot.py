"""srt/managers/load_snapshot.py: a rank's load, and the newest of every rank."""

from __future__ import annotations

from pathlib import Path

import msgspec


class DisaggregationMetrics(msgspec.Struct, array_like=True):
    mode: str
    prefill_bootstrap_queue_reqs: int = 0
    prefill_inflight_queue_reqs: int = 0
    decode_prealloc_queue_reqs: int = 0
    decode_transfer_queue_reqs: int = 0
    decode_retracted_queue_reqs: int = 0
    kv_transfer_speed_gb_s: float = 0.0
    kv_transfer_latency_ms: float = 0.0


class LoadSnapshot(msgspec.Struct, omit_defaults=True):
    """The fields that both versions have and the double fills."""

    timestamp: float = 0.0
    dp_rank: int = 0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    disaggregation: DisaggregationMetrics | None = None


def shm_path_for(ipc_name: str) -> str:
    return f"/dev/shm/sglang_loads_double_{ipc_name}.shm"


class LoadSnapshotReader:
    """The real ones read a file or a socket; here the manager puts the snapshots in, and the file is empty."""

    def __init__(self, path: str) -> None:
        Path(path).touch()
        self.newest: dict[int, LoadSnapshot] = {}

    def read_all(self) -> list[LoadSnapshot]:
        return [self.newest[rank] for rank in sorted(self.newest)]

    def close(self) -> None:
        self.newest = {}
