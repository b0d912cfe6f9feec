"""A LaunchSpec as vLLM's own arguments and environment; pure, and without importing vLLM."""

from __future__ import annotations

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
    "data_parallel_rpc_port": "nothing: vLLM takes a free one",
    "data_parallel_backend": "nothing: Ray places nodes, vLLM starts its ranks there",
    "data_parallel_external_lb": "nothing: the ingress picks the rank of every request",
    "data_parallel_hybrid_lb": "nothing: the ingress picks the rank of every request",
    "pipeline_parallel_size": "parallelism.pp",
    "enable_expert_parallel": "parallelism.moe_ep",
    "nnodes": "nodes",
    "node_rank": "nothing: nodes are numbered by placement",
    "master_addr": "nothing: it is the leader node's address",
    "master_port": "nothing: vLLM takes a free one",
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


def engine_args(spec: LaunchSpec, on_cpu: bool) -> dict[str, Any]:
    """The keyword arguments of vLLM's AsyncEngineArgs.

    Raises:
        EngineStartError: The layout is one that this adapter cannot start.
    """
    _check_layout(spec)
    args: dict[str, Any] = dict(CPU_DEFAULTS) if on_cpu else {}
    args |= {
        **spec.engine_args,
        "model": spec.model_path,
        "skip_tokenizer_init": True,
        "generation_config": spec.engine_args.get("generation_config", "vllm"),
        "tensor_parallel_size": spec.attn_tp,
        "data_parallel_size": spec.attn_dp,
        "pipeline_parallel_size": spec.pp,
        "enable_expert_parallel": spec.moe_ep > 1,
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if spec.attn_tp * spec.pp == 1:
        args["distributed_executor_backend"] = UNIPROC_EXECUTOR
    if spec.attn_dp > 1:
        args["data_parallel_address"] = spec.leader.address
    if spec.role is not Role.AGGREGATED:
        args["kv_transfer_config"] = _transfer(spec, on_cpu)
    if spec.kv_events:
        args["kv_events_config"] = _events()
    return args


def environment(
    spec: LaunchSpec, on_cpu: bool, socket_folder: str, side_channel_port: int, interface: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of the engine's processes, for this engine alone.

    Args:
        socket_folder: where vLLM puts the Unix sockets between its processes; it never removes them.
        side_channel_port: rank r of a prefill or decode engine listens for NIXL handshakes on this plus r.
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
    }
    if spec.role is not Role.AGGREGATED:
        must |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": spec.place.address,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel_port),
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


def _check_layout(spec: LaunchSpec) -> None:
    ranks = spec.attn_tp * spec.attn_dp * spec.pp
    if spec.num_nodes > 1:
        raise EngineStartError("nodes: a vLLM worker runs on one node; use nodes: 1 and more replicas")
    if spec.moe_ep > 1 and spec.moe_ep != spec.attn_tp * spec.attn_dp:
        raise EngineStartError(
            f"parallelism.moe_ep: vLLM spreads experts over all {spec.attn_tp * spec.attn_dp} ranks or none; "
            f"use {spec.attn_tp * spec.attn_dp} or 1"
        )
    if spec.cores and len(spec.cores) % ranks:
        raise EngineStartError(
            f"resources.cpus: {len(spec.cores)} cores do not divide among {ranks} ranks; use a multiple of {ranks}"
        )
    if spec.transfer_backend != "nixl":
        raise EngineStartError(f"transfer.backend: vLLM hands over by 'nixl', not {spec.transfer_backend!r}")


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
    ranks = spec.attn_tp * spec.attn_dp * spec.pp
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
