"""A LaunchSpec as SGLang's own arguments and environment; pure, and without importing SGLang.

Ports of one node, in the order of its block:

| offset | on | used for |
|---|---|---|
| 0 | the leader | torch.distributed's rendezvous (dist_init_addr) |
| 1..7 | the leader | what SGLang derives from it: tokenizer, detokenizer, RPC, metrics, input, load |
| 8 | each node | NCCL's rendezvous, where SGLang needs one of its own |
| 9 | the leader | a prefill worker's bootstrap server |
| 10 | none | `port`, which SGLang checks and derives from, though no HTTP server runs |
| 13 | the leader | where attention DP ranks learn each other's ports (data_parallel_controller.py) |
| 16.. | each node | KV events, their replay and published load: one each a rank of this node |

(server_args.py PortArgs.init_new and kv_events.py offset_endpoint_port of 0.5.16 and 0.5.23.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from backends.engine import EngineStartError, Feature, LaunchSpec, NodePlace, Role

DIST_INIT, NCCL, BOOTSTRAP, HTTP, EVENTS = 0, 8, 9, 10, 16
PAGE_SIZE = 64
"""Tokens a page where `engine_args` does not say: what MLA kernels need, and few enough events a prompt."""
MAX_TAKEN_IN = 32
"""Requests and commands that a scheduler takes in between two steps, while its lockstep group waits. The others of a
burst come in while the GPU has a step to do."""

OWNED: dict[str, str] = {
    "model_path": "model.path",
    "tokenizer_path": "model.path",
    "served_model_name": "model.name",
    "skip_tokenizer_init": "nothing: engines take and return token ids",
    "tp_size": "parallelism.attn_tp and parallelism.attn_dp",
    "dp_size": "parallelism.attn_dp, or replicas",
    "attn_dp_size": "parallelism.attn_dp",
    "enable_dp_attention": "parallelism.attn_dp",
    "ep_size": "parallelism.moe_ep",
    "pp_size": "parallelism.pp",
    "ep_num_redundant_experts": "parallelism.redundant_experts",
    "nnodes": "nodes",
    "node_rank": "nothing: nodes are numbered by placement",
    "dist_init_addr": "nothing: it is the leader node's address",
    "nccl_port": "nothing: ports are reserved by placement",
    "host": "nothing: sockets bind to the node's address",
    "port": "nothing: the ingress serves HTTP",
    "base_gpu_id": "nothing: Ray gives each node its GPUs",
    "gpu_id_step": "nothing: Ray gives each node its GPUs",
    "use_ray": "launcher",
    "disaggregation_mode": "prefill and decode in place of aggregated",
    "disaggregation_transfer_backend": "transfer.backend",
    "disaggregation_bootstrap_port": "nothing: ports are reserved by placement",
    "enable_pd_role_switch": "prefill and decode: a worker keeps its role",
    "load_balance_method": "nothing: the ingress picks the rank of every request",
    "kv_events_config": "events",
    "load_publish_endpoint": "nothing: load is read where it is made",
    "enable_lora": "model.loras",
    "lora_paths": "model.loras",
    "incremental_streaming_output": "nothing: each step's new tokens are streamed",
    "stream_output": "nothing: each step's new tokens are streamed",
    "tokenizer_worker_num": "nothing: the ingress tokenises",
    "detokenizer_worker_num": "nothing: the ingress detokenises",
    "reasoning_parser": "model",
    "tool_call_parser": "model",
    "chat_template": "model.path: the ingress reads the template there",
    "api_key": "api_keys",
    "admin_api_key": "api_keys",
    "grpc_port": "nothing: the data plane is ours",
    "grpc_mode": "nothing: the data plane is ours",
    "smg_grpc_mode": "nothing: the data plane is ours",
}
"""Arguments that follow from the rest of the configuration -> what to set instead."""


@dataclass(frozen=True, slots=True)
class RankPorts:
    """Where the ranks of one node publish. SGLang adds the rank's number in the whole worker to a base."""

    place: NodePlace
    first_rank: int
    num_ranks: int

    def base(self, stream: int) -> int:
        """The port SGLang is told for stream 0 (events), 1 (their replay) or 2 (load)."""
        return self.place.ports[EVENTS + stream * self.num_ranks] - self.first_rank

    def endpoint(self, stream: int, rank: int) -> str:
        return f"tcp://{self.place.address}:{self.base(stream) + rank}"


def engine_args(spec: LaunchSpec, version: str) -> dict[str, Any]:
    """The keyword arguments of SGLang's Engine on this node.

    Raises:
        EngineStartError: The layout is one that SGLang cannot start.
    """
    check_layout(spec)
    ports = spec.place.ports
    args: dict[str, Any] = {
        "page_size": PAGE_SIZE,
        "log_level": "info",
        **spec.engine_args,
        "model_path": spec.model_path,
        "skip_tokenizer_init": not masks_tokens(spec),
        "incremental_streaming_output": True,
        "tp_size": spec.attn_tp * spec.attn_dp,
        "ep_size": spec.moe_ep,
        "pp_size": spec.pp,
        "nnodes": spec.num_nodes,
        "node_rank": spec.node_rank,
        "dist_init_addr": f"{_host(spec.leader.address)}:{spec.leader.ports[DIST_INIT]}",
        # SGLang's Ray engine meets at this port, where the others meet at dist_init_addr (ray/engine.py).
        "nccl_port": spec.leader.ports[DIST_INIT if spec.launcher == "ray" else NCCL],
        "host": spec.place.address,
        "port": ports[HTTP],
    }
    if not masks_tokens(spec):
        args["grammar_backend"] = "none"
    if spec.attn_dp > 1:
        args |= _attention_dp(spec.attn_dp, version)
    if spec.redundant_experts:
        args["ep_num_redundant_experts"] = spec.redundant_experts
    if spec.role is not Role.AGGREGATED:
        args |= {
            "disaggregation_mode": spec.role.value,
            "disaggregation_transfer_backend": spec.transfer_backend,
            "disaggregation_bootstrap_port": spec.leader.ports[BOOTSTRAP],
        }
    if publishes_events(spec):
        args["kv_events_config"] = json.dumps(_events(spec, version))
    if spec.loras:
        args |= {"enable_lora": True, "lora_paths": dict(spec.loras)}
    return args


def environment(spec: LaunchSpec, interface: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of the engine's processes, for this engine alone.

    Args:
        interface: the network interface of the node's address, where it is known.

    Returns:
        What must be so, and what is so unless the process's environment says otherwise.
    """
    address = spec.place.address
    must = {
        "SGLANG_HOST_IP": address,
        "HOST_IP": address,
        # A node that is not the leader returns from its start instead of serving a dummy health check for ever.
        "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
    }
    if spec.launcher == "ray":
        # Its scheduler actors take Ray's absolute GPU ids, which are wrong once Ray hides the other GPUs.
        must["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    defaults = {"HF_HUB_OFFLINE": "1"}
    if spec.launcher == "processes":  # Ray's actors have the environment of their node
        defaults["SGLANG_SCHEDULER_MAX_RECV_PER_POLL"] = str(MAX_TAKEN_IN)
    if interface is not None:
        defaults |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return must, defaults


def check_layout(spec: LaunchSpec) -> None:
    """Refuse what SGLang cannot start, before anything is started."""
    width = spec.attn_tp * spec.attn_dp
    if width % spec.moe_ep:
        raise EngineStartError(f"parallelism.moe_ep: SGLang needs a divisor of attn_tp*attn_dp={width}")
    if spec.num_ranks % spec.num_nodes:
        raise EngineStartError(f"nodes: {spec.num_ranks} ranks do not divide by {spec.num_nodes} nodes")
    if spec.num_nodes > 1 and spec.pp % spec.num_nodes and spec.num_nodes % spec.pp:
        raise EngineStartError(f"nodes: {spec.num_nodes} nodes and pp={spec.pp}: one must be a multiple of the other")
    if spec.pp > 1 and spec.attn_dp > 1 and spec.num_nodes > 1:
        raise EngineStartError("parallelism.pp: not with attn_dp over several nodes; use pp: 1")
    if spec.launcher == "ray" and spec.role is Role.PREFILL:
        raise EngineStartError(
            "prefill.launcher: SGLang's Ray engine registers its bootstrap server too late to be found; use processes"
        )
    needed = num_ports(spec)
    if any(len(node.ports) < needed for node in spec.nodes):
        raise EngineStartError(f"ports: SGLang needs {needed} consecutive ones on each node")


def masks_tokens(spec: LaunchSpec) -> bool:
    """Structured output was asked for: SGLang's grammars need the tokenizer, which it has only without
    skip_tokenizer_init (constrained/grammar_manager.py)."""
    return bool(spec.engine_args.get("grammar_backend", "none") != "none")


def caches_prefixes(spec: LaunchSpec) -> bool:
    """As it is asked for; without a word SGLang does, but not on decode."""
    if spec.role is Role.DECODE:
        return bool(spec.engine_args.get("disaggregation_decode_enable_radix_cache", False))
    return not bool(spec.engine_args.get("disable_radix_cache", False))


def publishes_events(spec: LaunchSpec) -> bool:
    return spec.kv_events and caches_prefixes(spec)


def features(spec: LaunchSpec) -> tuple[Feature, ...]:
    """What requests may ask for, as this engine is started."""
    args = spec.engine_args
    # SGLang reads sampling_seed under this condition only (sampling_batch_info.py), and its schedulers end at a request
    # with min_p under it (sampler.py).
    sampling = Feature.SEED if args.get("enable_deterministic_inference") else Feature.MIN_P
    found = [sampling, Feature.CACHE_SALT]
    if priority_order(spec):
        found.append(Feature.PRIORITY)
    if masks_tokens(spec):
        found += [Feature.MIN_TOKENS, Feature.JSON_OBJECT, Feature.JSON_SCHEMA, Feature.REGEX, Feature.GRAMMAR]
    return tuple(found)


def priority_order(spec: LaunchSpec) -> int:
    """Of SGLang's priorities: 1 where greater ones run earlier, -1 where smaller ones do, 0 where there are none."""
    if not spec.engine_args.get("enable_priority_scheduling"):
        return 0
    return -1 if spec.engine_args.get("schedule_low_priority_values_first") else 1


def controls(spec: LaunchSpec) -> tuple[str, ...]:
    memory = ("sleep", "wake") if spec.engine_args.get("enable_memory_saver") else ()
    return ("pause", "resume", "update_weights", *memory)


def num_ports(spec: LaunchSpec) -> int:
    """Of one node's block."""
    return EVENTS + 3 * (spec.attn_dp if spec.launcher == "ray" else num_local_ranks(spec))


def num_local_ranks(spec: LaunchSpec) -> int:
    """Attention DP ranks that publish from one node, at most: all of a narrow worker's, its share of a wide one's."""
    return -(-spec.attn_dp // spec.num_nodes)


def rank_ports(spec: LaunchSpec, node_rank: int) -> RankPorts:
    """Where that node's ranks publish.

    Every node has a base of its own, but for the Ray launcher: SGLang tells all its actors the leader's. A worker's
    ranks then need as many ports of the leader's block, and the same ones free on the other nodes.
    """
    if spec.launcher == "ray":
        return RankPorts(NodePlace(spec.nodes[node_rank].address, spec.leader.ports), 0, spec.attn_dp)
    return RankPorts(spec.nodes[node_rank], first_rank_of(spec, node_rank), num_local_ranks(spec))


def first_rank_of(spec: LaunchSpec, node_rank: int) -> int:
    """The first attention DP rank that begins on that node, or on a later one."""
    return -(-node_rank * spec.attn_dp // spec.num_nodes)


def node_of_rank(spec: LaunchSpec, dp_rank: int) -> int:
    """The node whose process publishes for that rank: where its first attention TP rank is."""
    tp_rank = dp_rank * spec.attn_tp
    return tp_rank * spec.num_nodes // (spec.attn_tp * spec.attn_dp)


def _attention_dp(attn_dp: int, version: str) -> dict[str, Any]:
    """0.5.23 has a width of its own for it; in 0.5.16 `dp_size` means it beside a switch."""
    if version == "0.5.16":
        return {"dp_size": attn_dp, "enable_dp_attention": True}
    return {"attn_dp_size": attn_dp}


def _events(spec: LaunchSpec, version: str) -> dict[str, Any]:
    """0.5.16 binds its PUB socket to wildcards only, of which our main of its processes makes the node's address. The
    Ray launcher's actors run on several nodes and not under our main: their sockets stay on every address."""
    ports = rank_ports(spec, spec.node_rank)
    on_ray = spec.launcher == "ray"
    config: dict[str, Any] = {
        "publisher": "zmq",
        "endpoint": f"tcp://{'*' if on_ray or version == '0.5.16' else ports.place.address}:{ports.base(0)}",
        "replay_endpoint": f"tcp://{'*' if on_ray else ports.place.address}:{ports.base(1)}",
    }
    return config if version == "0.5.16" else config | {"bind": True}


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
