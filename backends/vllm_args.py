"""A LaunchSpec as vLLM's own arguments and environment; pure, and without importing vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends.engine import EngineStartError, LaunchSpec, Role

UNIPROC_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the model inside the engine core's process. Named by its path: on CPU vLLM turns "uni" into a second process
per rank, about 0.6 GiB, because it cannot bind OpenMP threads in the first; we bind them (backends.vllm_processes)."""

WORKER_EXTENSION = "backends.vllm_worker.HeldBlocks"

CORES_VARIABLE = "DYNAMO_RAY_ENGINE_CORES"
"""The cores of every rank of the engine: `0,1;2,3` for two ranks of two."""

OWNED: dict[str, str] = {
    "model": "model.path",
    "tokenizer": "model.path",
    "served_model_name": "model.name",
    "skip_tokenizer_init": "nothing: engines take and return token ids",
    "tensor_parallel_size": "parallelism.attn_tp",
    "data_parallel_size": "parallelism.attn_dp",
    "data_parallel_size_local": "nodes and parallelism.attn_dp",
    "data_parallel_rank": "nothing: ranks are numbered by placement",
    "data_parallel_start_rank": "nothing: ranks are numbered by placement",
    "data_parallel_address": "nothing: it is the leader node's address",
    "data_parallel_rpc_port": "nothing: it is one of the leader node's ports",
    "data_parallel_backend": "nothing: Ray places nodes, vLLM starts its ranks there",
    "data_parallel_external_lb": "nothing: the ingress picks the rank of every request",
    "data_parallel_hybrid_lb": "nothing: the ingress picks the rank of every request",
    "pipeline_parallel_size": "parallelism.pp",
    "enable_expert_parallel": "parallelism.moe_ep",
    "eplb_config.num_redundant_experts": "parallelism.redundant_experts",
    "enable_lora": "model.loras",
    "nnodes": "nodes",
    "node_rank": "nothing: nodes are numbered by placement",
    "master_addr": "nothing: it is the leader node's address",
    "master_port": "nothing: it is one of the leader node's ports",
    "distributed_executor_backend": "nothing: it follows from parallelism",
    "worker_extension_cls": "nothing: it frees handed-off KV blocks",
    "kv_transfer_config": "transfer, and prefill and decode in place of aggregated",
    "kv_events_config": "events",
    "enable_log_requests": "nothing: the ingress logs requests",
    "disable_log_stats": "nothing: load and counters are read from the stats",
}
"""Arguments that follow from the rest of the configuration -> what to set instead."""

CPU_DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 * 1024 * 1024,
}
"""On CPU, where `engine_args` does not say otherwise: no compiler needed, blocks that the kernels like and that make
prefix hits fine-grained (vLLM's own default is 128), and not the nine tenths of the machine that vLLM would take."""


@dataclass(frozen=True, slots=True)
class Share:
    """The attention DP ranks, of the worker's, whose engine cores one node runs."""

    first_rank: int
    num_ranks: int
    """0 on a node that lends its devices to the leader's one rank."""


def share(spec: LaunchSpec) -> Share:
    """This node's; every node has as many ranks, or the leader has the only one."""
    if spec.attn_dp % spec.num_nodes == 0:
        num_ranks = spec.attn_dp // spec.num_nodes
        return Share(spec.node_rank * num_ranks, num_ranks)
    return Share(0, 1 if spec.node_rank == 0 else 0)


def caches_prefixes(spec: LaunchSpec) -> bool:
    """As it is asked for; without a word vLLM does. On CPU it turns it off for MLA by itself."""
    return spec.engine_args.get("enable_prefix_caching") is not False


def spans_nodes(spec: LaunchSpec) -> bool:
    """Whether the devices of one attention DP rank are on several nodes."""
    return spec.attn_dp % spec.num_nodes != 0


def num_ports(spec: LaunchSpec) -> int:
    """Consecutive ports that this node takes of its own."""
    return rendezvous_offset(spec) + 1


def rendezvous_offset(spec: LaunchSpec) -> int:
    """Of the port, in the leader's block, where the nodes meet; NIXL's handshakes come first."""
    return max(1, spec.attn_dp // spec.num_nodes)


def engine_args(spec: LaunchSpec, on_cpu: bool, tokenizer: bool = True) -> dict[str, Any]:
    """The keyword arguments of vLLM's AsyncEngineArgs.

    Args:
        tokenizer: the model's folder has one, with which answers can be held to a structure.

    Raises:
        EngineStartError: The layout is one that vLLM cannot start.
    """
    _check_layout(spec, on_cpu)
    args: dict[str, Any] = dict(CPU_DEFAULTS) if on_cpu else {}
    args |= {
        **_loras(spec),
        **spec.engine_args,
        **_redundant_experts(spec),
        "model": spec.model_path,
        # Prompts and answers are token ids all the same; the grammars of structured answers need it.
        "skip_tokenizer_init": not tokenizer or spec.role is Role.PREFILL,
        "generation_config": spec.engine_args.get("generation_config", "vllm"),
        "tensor_parallel_size": spec.attn_tp,
        "data_parallel_size": spec.attn_dp,
        "pipeline_parallel_size": spec.pp,
        "enable_expert_parallel": spec.moe_ep > 1,
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    # Said in any case: inside a Ray actor's placement group vLLM would otherwise start its ranks as Ray actors.
    args["distributed_executor_backend"] = UNIPROC_EXECUTOR if spec.attn_tp * spec.pp == 1 else "mp"
    if spec.attn_dp > 1:
        args["data_parallel_address"] = spec.leader.address
    if spec.num_nodes > 1:
        args |= _nodes(spec)
    if spec.role is not Role.AGGREGATED:
        args["kv_transfer_config"] = _transfer(spec, on_cpu)
    if spec.kv_events:
        args["kv_events_config"] = _events()
    return args


def check_model(spec: LaunchSpec, num_experts: int) -> None:
    """Refuse a layout that this model cannot have; `num_experts` is 0 for a model without any.

    Raises:
        EngineStartError: It names the field.
    """
    if spec.redundant_experts and (num_experts + spec.redundant_experts) % spec.moe_ep:
        raise EngineStartError(
            f"parallelism.redundant_experts: {num_experts} experts and {spec.redundant_experts} more do not divide "
            f"among {spec.moe_ep} ranks; use a multiple of {spec.moe_ep}, less {num_experts % spec.moe_ep}"
        )
    if spec.num_nodes > 1 and not spans_nodes(spec) and spec.attn_dp > 1 and num_experts == 0:
        raise EngineStartError(
            "nodes: the ranks of a model without experts have nothing to tell each other, and vLLM starts none of "
            "its own on further nodes; use nodes: 1 and more replicas"
        )


def environment(
    spec: LaunchSpec, on_cpu: bool, socket_folder: str, side_channel_port: int, interface: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of the engine's processes, for this engine alone.

    Args:
        socket_folder: where vLLM puts the Unix sockets between its processes; it never removes them.
        side_channel_port: this node's r-th rank, of a prefill or decode engine, listens for NIXL handshakes on this
            plus r.
        interface: the network interface of `spec.place.address`, where it is known.

    Returns:
        What must be so because it differs from engine to engine, and what is so unless the process's environment says
        otherwise.
    """
    must = {"VLLM_HOST_IP": spec.place.address, "VLLM_RPC_BASE_PATH": socket_folder}
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        # Prefill and decode then publish the same hash for the same block.
        "PYTHONHASHSEED": "0",
        # A fork of a process with threads, which vLLM's default may be, can hang.
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    }
    if spec.role is not Role.AGGREGATED:
        must |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": spec.place.address,
            # vLLM adds the rank's number among all of the worker's.
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel_port - share(spec).first_rank),
        }
        # vLLM sets this too, but not where NIXL was imported before.
        defaults["UCX_RCACHE_MAX_UNRELEASED"] = "1024"
    if on_cpu:
        must |= _cpu_cores(spec)
        defaults |= _cpu_defaults(spec, interface)
    return must, defaults


def cores_of_rank(cores: tuple[int, ...], num_ranks: int, rank: int) -> tuple[int, ...]:
    """A rank's share of `LaunchSpec.cores`, in rank order; empty where cores are not pinned."""
    share = len(cores) // num_ranks
    return cores[rank * share : (rank + 1) * share]


def _check_layout(spec: LaunchSpec, on_cpu: bool) -> None:
    ranks = _num_local_devices(spec)
    if spec.attn_dp % spec.num_nodes and (spec.attn_dp > 1 or spec.attn_tp * spec.pp % spec.num_nodes):
        raise EngineStartError(
            f"nodes: vLLM shares {spec.attn_dp} attention DP ranks of {spec.attn_tp * spec.pp} devices out evenly, or "
            f"one rank's devices; {spec.num_nodes} nodes do neither: use a number that divides "
            f"parallelism.attn_dp={spec.attn_dp}, or attn_dp: 1 and one that divides attn_tp * pp"
        )
    if spec.num_nodes > 1 and spec.place.ports and len(spec.place.ports) < num_ports(spec):
        raise EngineStartError(f"ports: {num_ports(spec)} are needed on each node; there are {len(spec.place.ports)}")
    if spec.moe_ep > 1 and spec.moe_ep != spec.attn_tp * spec.attn_dp:
        raise EngineStartError(
            f"parallelism.moe_ep: vLLM spreads experts over all {spec.attn_tp * spec.attn_dp} ranks or none; "
            f"use {spec.attn_tp * spec.attn_dp} or 1"
        )
    if spec.cores and len(spec.cores) % ranks:
        raise EngineStartError(
            f"resources.cpus: {len(spec.cores)} cores do not divide among {ranks} ranks; use a multiple of {ranks}"
        )
    if on_cpu and spec.pp > 1:
        # Its later stages never make the buffers that they receive into, unless they are warmed up.
        raise EngineStartError("parallelism.pp: vLLM's build for CPUs fails in the first step; use 1, and attn_tp")
    if spec.redundant_experts and spec.moe_ep == 1:
        raise EngineStartError(
            "parallelism.redundant_experts: vLLM balances experts only among ranks that share them out; set moe_ep, or "
            "redundant_experts to 0"
        )
    if spec.redundant_experts and spec.engine_args.get("enable_eplb") is False:
        raise EngineStartError(
            f"engine_args.enable_eplb: {spec.redundant_experts} redundant experts need it; leave it out"
        )
    if spec.transfer_backend != "nixl":
        raise EngineStartError(f"transfer.backend: vLLM hands over by 'nixl', not {spec.transfer_backend!r}")


def _num_local_devices(spec: LaunchSpec) -> int:
    return spec.num_ranks // spec.num_nodes


def _nodes(spec: LaunchSpec) -> dict[str, Any]:
    """Several nodes: each serves its own attention DP ranks, or all are one rank that the leader serves."""
    port = spec.leader.ports[rendezvous_offset(spec)]
    if spans_nodes(spec):
        return {
            "nnodes": spec.num_nodes,
            "node_rank": spec.node_rank,
            "master_addr": spec.leader.address,
            "master_port": port,
        }
    mine = share(spec)
    return {
        "data_parallel_size_local": mine.num_ranks,
        "data_parallel_start_rank": mine.first_rank,
        "data_parallel_hybrid_lb": True,
        "data_parallel_rpc_port": port,
    }


def _redundant_experts(spec: LaunchSpec) -> dict[str, Any]:
    if not spec.redundant_experts:
        return {}
    config = {**spec.engine_args.get("eplb_config", {}), "num_redundant_experts": spec.redundant_experts}
    return {"enable_eplb": True, "eplb_config": config}


def _loras(spec: LaunchSpec) -> dict[str, Any]:
    """All of them at once in a batch, unless the user says otherwise."""
    return {"enable_lora": True, "max_loras": len(spec.loras)} if spec.loras else {}


def _transfer(spec: LaunchSpec, on_cpu: bool) -> dict[str, Any]:
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer" if spec.role is Role.PREFILL else "kv_consumer",
        # A decode leg without its KV is an error to retry elsewhere, never a silent recomputation.
        "kv_load_failure_policy": "fail",
    }
    return config | ({"kv_buffer_device": "cpu"} if on_cpu else {})


def _events() -> dict[str, Any]:
    """vLLM binds wildcard endpoints only; with port 0 that means VLLM_HOST_IP and a free port, which it reports."""
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:0",
        "replay_endpoint": "tcp://*:0",
    }


def _cpu_cores(spec: LaunchSpec) -> dict[str, str]:
    ranks = _num_local_devices(spec)
    shares = [",".join(map(str, cores_of_rank(spec.cores, ranks, rank))) for rank in range(ranks)]
    return {
        # For a rank inside its engine core, which we bind; the other is for the executor that starts a process a rank.
        CORES_VARIABLE: ";".join(shares) if spec.cores and spec.attn_tp * spec.pp == 1 else "",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(shares) if spec.cores else "nobind",
        # GNU OpenMP spins while it waits: more threads than cores of its own make a step several times slower.
        "OMP_NUM_THREADS": str(max(1, len(spec.cores) // ranks)),
    }


def _cpu_defaults(spec: LaunchSpec, interface: str | None) -> dict[str, str]:
    defaults = {
        "VLLM_TARGET_DEVICE": "cpu",
        "UCX_TLS": "tcp,sm,self",
        # A keepalive of UCX (in nixl 1.5.1) can leave a TCP endpoint armed for writing for ever: NIXL's progress thread
        # then takes a whole core. That a worker is dead or hangs, the ingress notices.
        "UCX_KEEPALIVE_INTERVAL": "inf",
        # Two arenas instead of eight a core: about 0.1 GiB less in each of the engine's processes.
        "MALLOC_ARENA_MAX": "2",
    }
    if spec.engine_args.get("enforce_eager", CPU_DEFAULTS["enforce_eager"]):
        # vLLM compiles its logprobs even then: 20 s in the first request that asks for them, and a C++ compiler.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    if interface is not None:
        defaults |= {"UCX_NET_DEVICES": interface, "GLOO_SOCKET_IFNAME": interface}
    return defaults
