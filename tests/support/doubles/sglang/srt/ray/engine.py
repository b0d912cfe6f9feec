"""srt/ray/engine.py: the same engine with its schedulers as Ray actors, one a GPU, in the placement group that its own
actor is in; one bundle a node, the first that of the engine's node."""

from __future__ import annotations

import os
import threading
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.scheduler import run_scheduler_process


@ray.remote
class SchedulerActor:
    def __init__(self, server_args: Any, port_args: Any, tp_rank: int, dp_rank: int | None) -> None:
        # The real one takes Ray's absolute GPU id, which is right only where Ray hides no GPU.
        assert os.environ.get("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES") == "1", "invalid device ordinal"
        (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        self._given = (server_args, port_args, int(gpu), tp_rank, *((0,) * 4), dp_rank, self)
        self._info: dict[str, Any] = {}
        self._ready = threading.Event()
        self._runs = threading.Thread(target=run_scheduler_process, args=self._given, daemon=True)
        self._runs.start()
        self._ready.wait()

    def send(self, info: dict[str, Any]) -> None:
        """As the pipe that a process would have."""
        self._info = info
        self._ready.set()

    def get_info(self) -> dict[str, Any]:
        return self._info

    def run_event_loop(self) -> None:
        self._runs.join()


def _create_scheduler_actor(pg: Any, bundle_idx: int, server_args: Any, **given: Any) -> Any:
    strategy = PlacementGroupSchedulingStrategy(pg, bundle_idx)
    options = {"num_cpus": 0, "num_gpus": 1, "scheduling_strategy": strategy}
    return SchedulerActor.options(**options).remote(server_args, **given)


class RayEngine(Engine):
    def shutdown(self) -> None:
        for actor in self._scheduler_init_result.scheduler_actors:  # type: ignore[attr-defined]
            ray.kill(actor)
        super().shutdown()

    def _start_schedulers(self) -> tuple[list[Any], list[Any]]:
        args, group = self.server_args, ray.util.get_current_placement_group()
        assert group is not None, "the engine's actor is in no placement group"
        of_node = placement_group_table(group)["bundles_to_node_id"]
        here = ray.get_runtime_context().get_node_id()
        bundles = sorted(of_node, key=lambda bundle: (of_node[bundle] != here, bundle))
        per_node = args.tp_size // args.nnodes
        actors = [
            _create_scheduler_actor(
                pg=group,
                bundle_idx=bundles[tp_rank // per_node],
                server_args=args,
                port_args=self.port_args,
                tp_rank=tp_rank,
                dp_rank=tp_rank // args.attn_tp_size if args.num_dp_ranks > 1 else None,
            )
            for tp_rank in range(args.tp_size)
        ]
        result: Any = self._scheduler_init_result
        result.scheduler_actors = actors
        result.scheduler_infos.extend(ray.get([actor.get_info.remote() for actor in actors]))
        loops = [actor.run_event_loop.remote() for actor in actors]

        def wait() -> None:
            try:
                ray.get(loops)
            except ray.exceptions.RayError:
                return

        result.wait_for_completion = result.block_until_scheduler_exits = wait
        return [], []
