"""What we add to vLLM's worker class, reachable by collective_rpc; runs inside the engine's processes."""

from __future__ import annotations

from typing import Any


class HeldBlocks:
    """Frees what finished prefill requests hold for a decode side that will not come.

    vLLM 0.32 has no call for it: `notify_kv_transfer_request_rejected` works on the *decode* engine, which then tells
    the prefill engine over NIXL; a request that no decode engine saw keeps its blocks until the lease (30 s) ends.
    Here the request is marked as sent, as if the decode side had notified; the next step reports that to the
    scheduler, which frees. While anything is held the engine steps about every millisecond, so that is at once.
    """

    def free_held_blocks(self, request_ids: list[str]) -> list[str]:
        """Free those of vLLM's request ids that are still held; returns them."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        if not has_kv_transfer_group():
            return []
        connector: Any = getattr(get_kv_transfer_group(), "connector_worker", None)
        if connector is None:
            return []
        freed = [request_id for request_id in request_ids if request_id in connector._reqs_to_process]
        for request_id in freed:
            connector._reqs_to_process.discard(request_id)
            connector._reqs_to_send.pop(request_id, None)
            connector.consumer_notification_counts_by_req.pop(request_id, None)
            connector.expected_consumer_notifications_by_req.pop(request_id, None)
            # The connector's own way to report requests that need no transfer, drained in every step.
            connector._replicated_pcp_done_sending.add(request_id)
        return freed
