"""A LaunchSpec as TensorRT-LLM's own arguments and environment; pure, and without importing TensorRT-LLM.

Only its Ray orchestrator is used: MPI's would need an MPI of its own around our processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.engine import EngineStartError, Feature, LaunchSpec, Role

EVENT_BUFFER = 65_536
"""KV events that TensorRT-LLM keeps between two of our polls where `engine_args` does not say."""
LARGEST_PLAIN_EP = 8
"""Up to here TensorRT-LLM 1.2 spreads experts without its MoE backend WIDEEP."""
MAX_LOGPROBS = 20
"""TensorRT-LLM takes up to 100; this is OpenAI's limit."""

OWNED: dict[str, str] = {
    "model": "model.path",
    "tokenizer": "model.path",
    "custom_tokenizer": "model.path",
    "skip_tokenizer_init": "nothing: engines take and return token ids",
    "backend": "nothing: only the PyTorch backend runs under Ray",
    "tensor_parallel_size": "parallelism.attn_tp and parallelism.attn_dp",
    "pipeline_parallel_size": "parallelism.pp",
    "context_parallel_size": "nothing: prompts are not split over ranks here",
    "moe_expert_parallel_size": "parallelism.moe_ep",
    "moe_tensor_parallel_size": "parallelism.moe_tp",
    "moe_cluster_parallel_size": "parallelism.moe_ep",
    "enable_attention_dp": "parallelism.attn_dp",
    "gpus_per_node": "nothing: Ray gives each node its GPUs",
    "orchestrator_type": "launcher",
    "mpi_session": "launcher",
    "ray_placement_config": "nothing: the worker has its own placement group",
    "ray_worker_extension_cls": "nothing: its workers are TensorRT-LLM's own",
    "env_overrides": "env",
    "num_postprocess_workers": "nothing: the ingress detokenises",
    "postprocess_tokenizer_dir": "nothing: the ingress detokenises",
    "num_serve_frontends": "ingress: it serves HTTP",
    "post_processor_hook": "nothing: the ingress detokenises",
    "reasoning_parser": "model",
    "stream_interval": "nothing: each step's new tokens are streamed",
    "enable_iter_perf_stats": "nothing: load is read from it",
    "enable_lora": "model.loras",
    "cache_transceiver_config.backend": "transfer.backend",
    "kv_cache_config.kv_events_config": "events",
}
"""Arguments that follow from the rest of the configuration -> what to set instead."""


def engine_args(spec: LaunchSpec, version: str) -> dict[str, Any]:
    """The keyword arguments of TensorRT-LLM's LLM, but for the placement group.

    Raises:
        EngineStartError: The layout or an argument is one that TensorRT-LLM cannot start.
    """
    check_layout(spec)
    check_arguments(spec, version)
    user = dict(spec.engine_args)
    if spec.role is Role.PREFILL:
        user.setdefault("disable_overlap_scheduler", True)  # its context servers know no other scheduler in 1.2
    args = user | {
        "model": spec.model_path,
        "skip_tokenizer_init": not masks_tokens(spec),
        "tensor_parallel_size": spec.attn_tp * spec.attn_dp,
        "enable_attention_dp": spec.attn_dp > 1,
        "pipeline_parallel_size": spec.pp,
        "gpus_per_node": spec.num_ranks // spec.num_nodes,
        "orchestrator_type": "ray",
        "enable_iter_perf_stats": True,
        "kv_cache_config": _kv_cache(spec),
    }
    if spec.role is not Role.AGGREGATED:
        args["cache_transceiver_config"] = _nested(spec, "cache_transceiver_config") | {
            "backend": spec.transfer_backend.upper()
        }
    if spec.moe_ep * spec.moe_tp > 1:  # a dense model has neither, and TensorRT-LLM takes no product but the width
        args |= {"moe_expert_parallel_size": spec.moe_ep, "moe_tensor_parallel_size": spec.moe_tp}
    if moe := _moe(spec, version):
        args["moe_config"] = moe
    if spec.loras:
        count = len(spec.loras)
        args["enable_lora"] = True
        args["lora_config"] = {"max_loras": count, "max_cpu_loras": count} | _nested(spec, "lora_config")
    return args


def environment(spec: LaunchSpec) -> tuple[dict[str, str], dict[str, str]]:
    """The environment in which LLM() is called; TensorRT-LLM gives all of it to its Ray workers, on every node.

    Returns:
        What must be so, and what is so unless the process's environment says otherwise.
    """
    must = {
        "TLLM_DISABLE_MPI": "1",
        "TLLM_RAY_FORCE_LOCAL_CLUSTER": "0",
        # Its workers find their GPU among all of the node's by Ray's id (RayWorkerWrapper.physical_to_local_id).
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    return must, {"HF_HUB_OFFLINE": "1", "TRTLLM_NO_USAGE_STATS": "1"}


def check_layout(spec: LaunchSpec) -> None:
    """Refuse what TensorRT-LLM cannot start, before anything is started."""
    width = spec.attn_tp * spec.attn_dp
    if spec.launcher != "ray":
        raise EngineStartError("launcher: TensorRT-LLM's ranks are Ray actors; use ray")
    if spec.attn_tp > 1 and spec.attn_dp > 1:
        raise EngineStartError(
            "parallelism.attn_tp: with attn_dp TensorRT-LLM has one attention rank a GPU; use attn_tp: 1"
        )
    if spec.moe_ep * spec.moe_tp not in (1, width):
        raise EngineStartError(
            f"parallelism.moe_ep: moe_ep*moe_tp={spec.moe_ep * spec.moe_tp} must be attn_tp*attn_dp={width}"
        )
    if spec.num_ranks % spec.num_nodes:
        raise EngineStartError(f"nodes: {spec.num_ranks} ranks do not divide by {spec.num_nodes} nodes")


def check_arguments(spec: LaunchSpec, version: str) -> None:
    """Refuse what cannot go together, beyond what the argument tables say."""
    slots = num_slots(spec)
    if spec.redundant_experts and slots is None:
        raise EngineStartError(
            "parallelism.redundant_experts: TensorRT-LLM places them with a load balancer only; set "
            "engine_args.moe_config.load_balancer.num_slots to the model's experts and these"
        )
    if slots is not None and slots % spec.moe_ep:
        raise EngineStartError(
            f"engine_args.moe_config.load_balancer.num_slots: {slots} is no multiple of moe_ep={spec.moe_ep}"
        )
    if version != "1.2" and _nested(spec, "moe_config").get("backend") == "WIDEEP":
        raise EngineStartError(
            "engine_args.moe_config.backend: WIDEEP is gone since 1.3; use CUTLASS on Hopper, DEEPGEMM, TRTLLM or "
            "CUTEDSL on Blackwell"
        )


def masks_tokens(spec: LaunchSpec) -> bool:
    """Structured output was asked for; its grammars need the tokenizer."""
    return spec.engine_args.get("guided_decoding_backend") is not None


def num_slots(spec: LaunchSpec) -> int | None:
    """Places for experts over all ranks, the model's own and copies, where a load balancer fills them."""
    balancer = _nested(spec, "moe_config").get("load_balancer")
    return balancer.get("num_slots") if isinstance(balancer, Mapping) else None


def caches_prefixes(spec: LaunchSpec) -> bool:
    """Where the user does not say: not on decode, whose prompts come from prefill whole."""
    return bool(_nested(spec, "kv_cache_config").get("enable_block_reuse", spec.role is not Role.DECODE))


def publishes_events(spec: LaunchSpec) -> bool:
    return spec.kv_events and caches_prefixes(spec)


def features(spec: LaunchSpec, version: str) -> tuple[Feature, ...]:
    """What requests may ask for, as this engine is started."""
    found = [Feature.MIN_TOKENS, Feature.CACHE_SALT]
    if spec.engine_args.get("sampler_type") == "TRTLLMSampler":
        found.append(Feature.SEED)  # The PyTorch sampler draws every request's tokens from one generator.
    if version != "1.2":
        found.append(Feature.MIN_P)
        if _nested(spec, "scheduler_config").get("waiting_queue_policy") == "priority":
            found.append(Feature.PRIORITY)
    if masks_tokens(spec):
        found += [Feature.JSON_OBJECT, Feature.JSON_SCHEMA, Feature.REGEX, Feature.GRAMMAR]
    return tuple(found)


def bundle_indices(spec: LaunchSpec) -> list[int]:
    """The placement group's bundle of every rank: a bundle holds all GPUs of a node, so each comes once a GPU.

    Rank 0 comes on the leader's node, where its RPC server listens on a local socket for the LLM (get_unique_ipc_addr).
    """
    return [bundle for bundle in spec.bundles for _ in range(spec.num_ranks // spec.num_nodes)]


def _kv_cache(spec: LaunchSpec) -> dict[str, Any]:
    config = {"enable_block_reuse": caches_prefixes(spec)} | _nested(spec, "kv_cache_config")
    if publishes_events(spec):
        config.setdefault("event_buffer_max_size", EVENT_BUFFER)
    return config


def _moe(spec: LaunchSpec, version: str) -> dict[str, Any]:
    """The user's; in 1.2 experts beyond one node's are balanced by one MoE backend only."""
    config = _nested(spec, "moe_config")
    if version == "1.2" and config.get("load_balancer") is not None and spec.moe_ep > LARGEST_PLAIN_EP:
        config.setdefault("backend", "WIDEEP")
    return config


def _nested(spec: LaunchSpec, name: str) -> dict[str, Any]:
    given = spec.engine_args.get(name)
    return dict(given) if isinstance(given, Mapping) else {}
