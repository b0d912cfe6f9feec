"""`up --fake-cluster`: a configuration's cluster on one machine, its nodes faked and its engines simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, isinf
from typing import Any

import backends
from backends.engine import EngineStartError, Role
from backends.simulated_args import parse_args
from dynamo_ray import models
from dynamo_ray.cli.checked import CheckedFile
from dynamo_ray.cluster.workload import worker_groups
from dynamo_ray.config import DeploymentConfig, RoleConfig
from dynamo_ray.config_file import IMPORT_PATH, Application
from dynamo_ray.errors import ConfigError, Problem
from placement.cluster_file import read_topology
from placement.gpus import GpuType, gpu_type
from placement.plan import PlacementError, WorkerGroup, plan
from placement.topology import ACCELERATOR_LABEL, DOMAIN_LABEL, NO_ACCELERATOR, Node, Topology, TopologyError

MODEL = "byte-tokenizer"
"""Tokenises where the configuration's own model is not on this machine."""
BLOCK_SIZE = 64
MAX_MODEL_LEN = 8192
KV_BLOCKS = 8192
"""Per rank, where a request of the longest kind needs no more."""
MAX_MORE_NODES = 64
"""Than the GPUs alone ask for, when a cluster is made to measure."""
NODE_CPUS = 1024
NODE_MEMORY_BYTES = 2**42
OBJECT_STORE_BYTES = 80 * 2**20

_BLOCK_SIZE = ("page_size", "block_size", "kv_cache_config.tokens_per_block")
_MAX_LENGTH = ("context_length", "max_model_len", "max_seq_len")
"""What SGLang, vLLM and TensorRT-LLM call them."""


@dataclass(frozen=True, slots=True)
class FakeCluster:
    """What `dynamo-ray up` serves in a file's place, and the nodes it runs on."""

    checked: CheckedFile
    """The file's applications with simulated engines."""
    topology: Topology
    leaf_labels: frozenset[str]

    def node_options(self) -> list[dict[str, Any]]:
        """What Ray is told of each node, in the topology's order."""
        return [self._options(node) for node in self.topology.nodes]

    def _options(self, node: Node) -> dict[str, Any]:
        labels = {ACCELERATOR_LABEL: node.accelerator, **dict.fromkeys(self.leaf_labels, node.leaf or "leaf")}
        if node.domain:
            labels[DOMAIN_LABEL] = node.domain
        cpus = NODE_CPUS if isinf(node.total.cpus) else node.total.cpus
        return {
            "num_cpus": cpus,
            "num_gpus": node.free.gpus,
            "memory": min(node.total.memory_bytes, NODE_MEMORY_BYTES),
            "object_store_memory": OBJECT_STORE_BYTES,
            "labels": labels,
        }


def fake_cluster(checked: CheckedFile, shape: str | None) -> FakeCluster:
    """The same placement, roles, widths and routing with simulated engines on a cluster that holds them.

    Args:
        shape: a shorthand such as 13x8xH100, or a topology file; None: as few nodes as its workers fit on.

    Raises:
        ConfigError: An application asks for no GPU, the shape is none, or it does not fit there.
    """
    for application in checked.applications:
        if application.config.accelerator == NO_ACCELERATOR:
            field = f"applications[{application.index}].args.accelerator"
            raise ConfigError((Problem(field, "computes on CPUs, and needs no fake nodes; start it without"),))
    made = _simulated_file(checked)
    topology = _to_measure(checked) if shape is None else _given(shape, checked)
    labels = {application.config.placement.leaf_label for application in checked.applications}
    return FakeCluster(made, topology, frozenset(label for label in labels if label is not None))


def simulated(config: DeploymentConfig) -> DeploymentConfig:
    """The same deployment with simulated engines that keep their blocks, prefix caching, lengths and hand-off."""
    tokenises = (config.model.folder / "tokenizer.json").is_file()
    changes: dict[str, Any] = {
        "backend": "simulated",
        "engine_version": None,
        "model": config.model if tokenises else config.model.model_copy(update={"path": str(models.folder(MODEL))}),
    }
    for role, role_config in config.roles.items():
        changes[role.value] = role_config.model_copy(
            update={"engine_args": _simulated_args(config.backend, role, role_config), "env": {}, "launcher": None}
        )
    document = config.model_copy(update=changes).model_dump(mode="json", exclude_unset=True)
    return DeploymentConfig.model_validate(document)


def _simulated_args(backend: str, name: Role, role: RoleConfig) -> dict[str, Any]:
    block_size = int(_first(role.engine_args, _BLOCK_SIZE) or BLOCK_SIZE)
    max_model_len = int(_first(role.engine_args, _MAX_LENGTH) or MAX_MODEL_LEN)
    return {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "kv_blocks": max(KV_BLOCKS, ceil(max_model_len / block_size)),
        "prefix_caching": backends.caches_prefixes(backend, name, role.engine_args),
        "handoff": "concurrent" if backend == "sglang" else "sequential",
        # vLLM's nodes each serve their own ranks; the others' are served through their leader.
        "serving": "every_node" if backend == "vllm" and role.parallelism.attn_dp > 1 else "leader",
    }


def _first(given: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of these dotted names that is given."""
    for name in names:
        found: Any = given
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _simulated_file(checked: CheckedFile) -> CheckedFile:
    """The same document with each application's `args` replaced."""
    value = {**checked.value, "applications": list(checked.value["applications"])}
    made: list[Application] = []
    for application in checked.applications:
        config = simulated(application.config)
        for role, role_config in config.roles.items():
            _check(application.index, role.value, role_config)
        raw = value["applications"][application.index]
        value["applications"][application.index] = {
            **raw,
            "import_path": IMPORT_PATH,
            "args": config.model_dump(mode="json", exclude_unset=True),
        }
        made.append(replace(application, config=config))
    return replace(checked, value=value, applications=tuple(made))


def _check(index: int, role: str, config: RoleConfig) -> None:
    try:
        parse_args(config.engine_args)
    except EngineStartError as error:
        field = f"applications[{index}].args.{role}"
        raise ConfigError((Problem(field, f"no simulated engine can stand for it: {error}"),)) from error


def _given(shape: str, checked: CheckedFile) -> Topology:
    try:
        topology = read_topology(shape)
    except TopologyError as error:
        raise ConfigError(tuple(Problem("topology", problem) for problem in error.problems)) from error
    problem = _misfit(topology, checked)
    if problem is not None:
        raise ConfigError((problem,))
    return topology


def _to_measure(checked: CheckedFile) -> Topology:
    """The smallest cluster on which everything fits, of nodes as they are sold with that GPU."""
    gpu = _gpu({application.config.accelerator for application in checked.applications})
    num_gpus = sum(group.needs.gpus * group.nodes * group.replicas for group in _groups(checked))
    fewest = max(1, ceil(num_gpus / gpu.gpus_per_node))
    problem: Problem | None = None
    for num_nodes in range(fewest, fewest + MAX_MORE_NODES):
        topology = _uniform(gpu, num_nodes)
        problem = _misfit(topology, checked)
        if problem is None:
            return topology
    assert problem is not None
    raise ConfigError((problem,))


def _gpu(kinds: set[str]) -> GpuType:
    if len(kinds) > 1:
        message = f"say what nodes there are: the file asks for {', '.join(sorted(kinds))}"
        raise ConfigError((Problem("topology", message),))
    try:
        return gpu_type(kinds.pop())
    except ValueError as error:
        raise ConfigError((Problem("topology", f"say what nodes there are: {error}"),)) from error


def _uniform(gpu: GpuType, num_nodes: int) -> Topology:
    wide = gpu.nvlink_domain_gpus > gpu.gpus_per_node
    domain = f"@nvl{gpu.nvlink_domain_gpus}" if wide else ""
    return read_topology(f"{num_nodes}x{gpu.gpus_per_node}x{gpu.name}{domain}")


def _groups(checked: CheckedFile) -> list[WorkerGroup]:
    """Of all applications; where there are several, each role is named with its application."""
    alone = len(checked.applications) == 1
    return [
        group if alone else replace(group, name=f"{application.name}.{group.name}")
        for application in checked.applications
        for group in worker_groups(application.config)
    ]


def _misfit(topology: Topology, checked: CheckedFile) -> Problem | None:
    """Why the workers of all applications together do not fit there; None when they do."""
    spares = sum(application.config.placement.spares for application in checked.applications)
    try:
        plan(topology, _groups(checked), spares=spares)
    except PlacementError as error:
        return Problem(error.group, str(error))
    return None
