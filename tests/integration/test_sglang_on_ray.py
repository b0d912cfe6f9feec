"""SGLang's schedulers as Ray actors (`launcher: ray`): what is ours in them, on its double."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray
import zmq.asyncio
from control import ENVIRONMENT
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

pytestmark = pytest.mark.filterwarnings("ignore")

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        paths = (SUPPORT.parents[1], SUPPORT, SUPPORT / "doubles")
        given = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        for name, value in (ENVIRONMENT | given).items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23"])
@pytest.mark.usefixtures("two_gpus")
def test_schedulers_that_are_ray_actors_tell_token_ids_packed_too(version: str) -> None:
    group = placement_group([{"CPU": 1, "GPU": 2}])
    there = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)

    @ray.remote(num_cpus=0, scheduling_strategy=there, runtime_env={"env_vars": {"SGLANG_DOUBLE_VERSION": version}})
    class Leader:
        async def first_blocks_of_each_rank(self) -> list[Any]:
            return await main()

    async def main() -> list[Any]:
        import engines
        from doubles import loader

        from backends.engine import LaunchSpec, Role

        spec = LaunchSpec(
            "a-0",
            Role.AGGREGATED,
            "doubled",
            loader.model("doubled"),
            version=version,
            launcher="ray",
            attn_dp=2,
            moe_ep=2,
            nodes=(engines.place(),),
        )
        found = []
        async with engines.running(spec, f"sglang-{version}") as (engine, info):
            for source in info.kv_event_sources:
                socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
                socket.connect(source.endpoint)
                socket.subscribe(b"")
                seed = source.dp_rank
                while True:  # until the subscription has arrived
                    prompt = engines.prompt(100, seed := seed + 2)
                    await engines.answer(engine, prompt, engines.greedy(1), dp_rank=source.dp_rank)
                    if await socket.poll(1000):
                        break
                _, _, payload = await socket.recv_multipart()
                found.append(msgspec.msgpack.decode(payload)[1][0])
                socket.close()
        return found

    try:
        blocks = ray.get(Leader.remote().first_blocks_of_each_rank.remote(), timeout=90)
    finally:
        ray.util.remove_placement_group(group)
    tokens = [block[3] if version == "0.5.16" else block["token_ids"] for block in blocks]
    assert [type(each) for each in tokens] == [bytes, bytes]
