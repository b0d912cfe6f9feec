"""Layouts of GPU workers on a real Ray of 13 fake nodes with 8 GPUs: reserved as planned, labels kept, nodes lost."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from control import APP, TIMEOUT_S, Deployed, config, deployed, fake_cluster, run
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from backends import model_folder
from dynamo_ray.cli.checked import check_file
from dynamo_ray.cluster import layout, model_check
from dynamo_ray.cluster.workload import worker_groups, works
from placement import reserve
from placement.parallelism import Parallelism
from placement.plan import PlacementError, WorkerGroup, WorkerPlacement, place
from placement.reserve import Reservation, ReservationError
from placement.topology import DOMAIN_LABEL, NODE_ID_LABEL, Topology, TopologyError

pytestmark = pytest.mark.filterwarnings("ignore")

WIDEEP = Path(__file__).parents[2] / "configs" / "deepseek-r1-wideep.yaml"
NUM_NODES = 13
FIRST = 11
"""The last number of the first node's address."""
RACK, ROW = "rack", "row"
"""Labels. Racks of 4 and 9 nodes, whose addresses alternate; all nodes but the last are said to be in a row."""
DOMAINS = {"a": (12, 15, 18), "b": (13, 16, 19)}
"""NVLink domains, by the last number of their nodes' addresses; the other nodes are in none."""


def fake_node(number: int) -> dict[str, Any]:
    labels = {"ray.io/accelerator-type": "H100", RACK: "r1" if number in (11, 14, 17, 20) else "r2"}
    for domain, numbers in DOMAINS.items():
        if number in numbers:
            labels[DOMAIN_LABEL] = domain
    if number < FIRST + NUM_NODES - 1:
        labels[ROW] = "1"
    return {
        "num_cpus": 2,
        "num_gpus": 8,
        "memory": 2**30,
        "object_store_memory": 80 * 2**20,
        "node_ip_address": f"127.0.0.{number}",
        "labels": labels,
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with fake_cluster([fake_node(number) for number in range(FIRST, FIRST + NUM_NODES)]) as made:
        yield made


@contextlib.contextmanager
def losing(cluster: Cluster) -> Iterator[Callable[[str], None]]:
    """Kills nodes, by id; in the end others with the same addresses and labels come in their place."""
    numbers: list[int] = []

    def lose(node_id: str) -> None:
        node = next(node for node in cluster.worker_nodes if node.node_id == node_id)
        numbers.append(int(node.node_ip_address.rpartition(".")[2]))
        cluster.remove_node(node, allow_graceful=False)

    try:
        yield lose
    finally:
        for number in numbers:
            cluster.add_node(**fake_node(number))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {TIMEOUT_S} s: {what}"
        time.sleep(0.05)


def wideep_groups() -> dict[str, WorkerGroup]:
    return {group.name: group for group in worker_groups(check_file(WIDEEP).applications[0].config)}


def wideep_layout(topology: Topology) -> layout.Layout:
    return layout.plan(check_file(WIDEEP).applications[0].config, topology)


def three_nodes(one_domain: bool, gpus: int = 8) -> WorkerGroup:
    shape = Parallelism(attn_dp=3 * gpus, moe_ep=3 * gpus)
    return WorkerGroup("wide", 1, 3, shape, accelerator="H100", one_domain=one_domain)


def node_ids(placement: WorkerPlacement) -> tuple[str, ...]:
    return tuple(bundle.node_id for bundle in placement.bundles)


def domains() -> dict[str, str]:
    """By the id of a living node."""
    return {node.node_id: node.domain for node in reserve.observe().nodes}


@contextlib.asynccontextmanager
async def reserved(placement: WorkerPlacement) -> AsyncIterator[Reservation]:
    name = f"t/{placement.worker}"
    try:
        yield await reserve.reserve(name, placement)
    finally:
        await reserve.release(name)


async def test_a_wide_layout_becomes_groups_of_whole_nodes_and_is_released(cluster: Cluster) -> None:
    planned = wideep_layout(reserve.observe()).plan
    assert {worker.worker: len(worker.bundles) for worker in planned.workers} == {"prefill-0": 4, "decode-0": 9}
    async with contextlib.AsyncExitStack() as undo:
        for worker in planned.workers:
            reservation = await undo.enter_async_context(reserved(worker))
            assert reservation.node_ids == node_ids(worker)
            assert [bundle.node_rank for bundle in worker.bundles] == list(range(len(worker.bundles)))
            bundles = placement_group_table(reservation.group)["bundles"]
            assert [bundles[index]["GPU"] for index in range(len(worker.bundles))] == [8.0] * len(worker.bundles)
        held = [node_id for found in (await reserve.find("t/")).values() if found for node_id in found.node_ids]
        assert len(set(held)) == len(held) == NUM_NODES
        with pytest.raises(PlacementError) as none_left:
            place(reserve.observe(), wideep_groups()["prefill"], "prefill-1")
    assert none_left.value.group == "prefill"
    assert none_left.value.largest == f"the largest free slot is 1 CPU, 1.0 GiB memory on 127.0.0.{FIRST}"
    assert str(none_left.value).startswith("prefill-1 needs 4 nodes, each with 8 GPUs, 1 CPU (H100) free; only 0 fit; ")
    assert await reserve.find("t/") == {}
    assert wideep_layout(reserve.observe()).plan == planned


async def test_what_is_released_is_free_at_once(cluster: Cluster) -> None:
    """Ray's own count lags behind; a plan made meanwhile would avoid the nodes that a lost group has left."""
    before = reserve.observe()
    for _ in range(10):
        async with reserved(place(before, three_nodes(one_domain=True), "wide-0")):
            pass
        assert reserve.observe() == before


def test_racks_of_the_cluster_are_read_and_no_worker_spans_two(cluster: Cluster) -> None:
    found = wideep_layout(reserve.observe(leaf_label=RACK))
    racks = {node.node_id: node.leaf for node in found.topology.nodes}
    assert {racks[node_id] for node_id in node_ids(found.plan.of("prefill-0"))} == {"r1"}
    assert {racks[node_id] for node_id in node_ids(found.plan.of("decode-0"))} == {"r2"}
    assert found.cost.alltoall_bytes == 0.0 < found.random.alltoall_bytes


def test_nvlink_domains_of_the_cluster_are_read_and_kept_where_asked(cluster: Cluster) -> None:
    topology = reserve.observe()
    domain = domains()
    anywhere = place(topology, three_nodes(one_domain=False), "wide-0")
    assert len({domain[node_id] for node_id in node_ids(anywhere)}) > 1
    together = place(topology, three_nodes(one_domain=True), "wide-0")
    assert {domain[node_id] for node_id in node_ids(together)} in [{name} for name in DOMAINS]


def test_a_node_without_the_label_for_leaves_is_named(cluster: Cluster) -> None:
    with pytest.raises(TopologyError) as error:
        reserve.observe(leaf_label=ROW)
    unlabelled = f"127.0.0.{FIRST + NUM_NODES - 1}"
    assert error.value.problems == (f"nodes[{unlabelled}].labels: has no 'row', which others have",)


def plan_command(cluster: Cluster, folder: Path, leaf_label: str) -> subprocess.CompletedProcess[str]:
    """`dynamo-ray plan` of the wide file, whose leaves are what that label says."""
    document = yaml.safe_load(WIDEEP.read_text())
    document["applications"][0]["args"]["placement"] = {"leaf_label": leaf_label}
    file = folder / "wide.yaml"
    file.write_text(yaml.safe_dump(document))
    command = [Path(sys.executable).parent / "dynamo-ray", "plan", file, "--address", cluster.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_the_plan_command_shows_the_layout_on_a_running_ray(cluster: Cluster, tmp_path: Path) -> None:
    done = plan_command(cluster, tmp_path, RACK)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.startswith(("pre", "dec"))}
    assert rows["prefill-0"][1:7] == ["127.0.0.11", "..", "127.0.0.20", "(4)", "32", "1"]
    assert rows["decode-0"][1:7] == ["127.0.0.12", "..", "127.0.0.23", "(9)", "72", "1"]
    assert "this layout: 0.00 " in done.stdout
    assert run(lambda: reserve.find("")) == {}


def test_the_plan_command_names_the_node_without_a_label(cluster: Cluster, tmp_path: Path) -> None:
    done = plan_command(cluster, tmp_path, ROW)
    assert done.returncode == 2
    assert "applications[0].args.placement.leaf_label: nodes[127.0.0.23].labels: has no 'row'" in done.stderr


@contextlib.asynccontextmanager
async def group_of_ray(name: str, **arguments: Any) -> AsyncIterator[PlacementGroup]:
    """A group as Ray makes it by itself."""
    group = placement_group(name=name, **arguments)
    try:
        assert group.wait(TIMEOUT_S)
        yield group
    finally:
        await reserve.release(name)


def bundle_nodes(group: PlacementGroup) -> dict[int, str]:
    found: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return found


def states(group: PlacementGroup) -> tuple[str, str]:
    entry = placement_group_table(group)
    return entry["state"], entry["stats"]["scheduling_state"]


def replaced(group: PlacementGroup, before: dict[int, str]) -> set[int]:
    """The bundles that are elsewhere or nowhere now."""
    return {index for index, node_id in bundle_nodes(group).items() if node_id != before[index]}


async def test_ray_moves_a_lost_bundle_but_not_out_of_its_domain_and_ours_are_seen_as_not_whole(
    cluster: Cluster,
) -> None:
    in_one_domain = {NODE_ID_LABEL: "STRICT_SPREAD", DOMAIN_LABEL: "STRICT_PACK"}
    async with contextlib.AsyncExitStack() as undo:
        plain = await undo.enter_async_context(
            group_of_ray("plain", bundles=[{"GPU": 1}] * NUM_NODES, strategy="SPREAD")
        )
        pinned = await undo.enter_async_context(
            group_of_ray("pinned", bundles=[{"GPU": 1}] * 3, topology_strategy=in_one_domain)
        )
        plain_before, pinned_before = bundle_nodes(plain), bundle_nodes(pinned)
        lost = pinned_before[0]
        domain = domains()[lost]
        inside = Topology(tuple(node for node in reserve.observe().nodes if node.domain == domain))
        planned = place(inside, three_nodes(one_domain=True, gpus=4), "wide-0")
        await undo.enter_async_context(reserved(planned))
        with losing(cluster) as lose:
            lose(lost)
            wait_until(lambda: lost not in domains(), "Ray says that the node is dead")

            there = {index for index, node_id in plain_before.items() if node_id == lost}
            wait_until(lambda: states(plain)[0] == "CREATED" and replaced(plain, plain_before) == there, "moved alone")

            wait_until(lambda: states(pinned) == ("RESCHEDULING", "INFEASIBLE"), "although another domain is free")
            assert replaced(pinned, pinned_before) == {0}

            assert await reserve.find("t/") == {"t/wide-0": None}
            survivors = [node for node in reserve.observe().nodes if node.node_id in node_ids(planned)]
            assert len(survivors) == 2
            assert all(node.free.gpus <= 8 - 4 - 1 for node in survivors), "what is left of it is still held"

            began_s = time.monotonic()
            with pytest.raises(ReservationError, match="infeasible, a planned node is gone or changed"):
                await reserve.reserve("t/wide-0", planned)
            assert time.monotonic() - began_s < 1.0
            assert await reserve.find("t/") == {}
        wait_until(lambda: states(pinned)[0] == "CREATED", "a new node of the domain completes it")
        assert replaced(pinned, pinned_before) == {0}


def whereabouts() -> tuple[str, ...]:
    """The nodes of the only worker, by bundle."""
    (held,) = run(lambda: reserve.find(f"{APP}/")).values()
    found: tuple[str, ...] = held.node_ids
    return found


def home_domain() -> str:
    """That of all its nodes, which are alive."""
    domain = domains()
    (found,) = {domain[node_id] for node_id in whereabouts()}
    return found


def lose_and_wait(it: Deployed, lose: Callable[[str], None], epoch: int) -> int:
    """Kill a node of the worker, and wait until a later incarnation than `epoch` serves; which."""
    lose(whereabouts()[0])
    seen = it.until(lambda seen: any(worker.epoch > epoch for worker in seen.workers), "it serves elsewhere")
    return seen.workers[0].epoch


def test_a_worker_that_lost_a_node_takes_a_spare_of_its_domain_and_then_another_domain(cluster: Cluster) -> None:
    wide = {"nodes": 2, "one_nvlink_domain": True, "parallelism": {"attn_dp": 16, "moe_ep": 16}}
    with losing(cluster) as lose, deployed(config(accelerator="H100", aggregated=wide)) as it:
        it.ready(1)
        first = home_domain()
        epoch = lose_and_wait(it, lose, 1)
        assert home_domain() == first, "one spare is left in it"
        lose_and_wait(it, lose, epoch)
        assert {first, home_domain()} == set(DOMAINS)


async def test_partial_weights_are_found_on_the_nodes_before_anything_is_taken(
    cluster: Cluster, tmp_path: Path
) -> None:
    found = check_file(WIDEEP).applications[0].config
    config = found.model_copy(update={"model": found.model.model_copy(update={"path": str(tmp_path)})})
    work = next(work for work in works(config).values() if work.config.nodes == 4)
    placement = place(reserve.observe(), work.group, work.worker, {})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / model_folder.INDEX).write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    said = await model_check.problem(config, work, placement)
    assert said is not None
    assert said.startswith("model.path: ")
    assert "lacks 1 of 1 files of weights: model-1.safetensors" in said
    assert f"(on node {placement.bundles[0].address})" in said
    (tmp_path / "model-1.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert await model_check.problem(config, work, placement) is None
