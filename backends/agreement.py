"""What a prefill and a decode engine must have in common for one to read the other's KV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends import LaunchPlan


@dataclass(frozen=True, slots=True)
class Common:
    """One thing to have in common."""

    name: str
    """An argument, dots going into nested ones; in capitals, a variable of the environment."""
    why: str
    default: Any = None
    alike: Mapping[Any, Any] | None = None
    """Other words for the same value."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    name: str
    message: str

    @property
    def in_environment(self) -> bool:
        return self.name.isupper()


HASHED = "it is part of the hash by which vLLM's NIXL connectors accept each other"
BLOCKS = "the router counts one kind of block, and the KV is read by whole ones"
DTYPES = {"half": "float16", "float": "float32"}

PAGES = {
    "flashmla": (64,),
    "cutlass_mla": (128,),
    "trtllm_mla": (64, 32),
    "tokenspeed_mla": (64, 32),
    "cutedsl_mla": (64, 32),
    "trtllm_mha": (64, 16, 32, 128),
    "hpc_ops": (64,),
}
"""Attention backends of SGLang that take only some page sizes, and make the first of them of any other
(_mla_backend_page_constraints in arg_groups/overrides.py, 0.5.16 and 0.5.23)."""
PAGED_IN_PREFILL = frozenset({"cutedsl_mla", "trtllm_mha", "hpc_ops"})
"""Those of them that do so as `prefill_attention_backend` too."""

COMMON: dict[str, tuple[Common, ...]] = {
    "vllm": (  # compute_nixl_compatibility_hash in vLLM's nixl/metadata.py, 0.32 and 0.33
        Common("model", HASHED),
        Common("block_size", BLOCKS),
        Common("dtype", HASHED, "auto", DTYPES),
        Common("kv_cache_dtype", HASHED, "auto"),
        Common("attention_backend", HASHED),
        Common("attention_config.backend", HASHED),
        Common("disable_hybrid_kv_cache_manager", HASHED),
        Common("speculative_config.method", HASHED),
        Common("speculative_config.model", HASHED),
        Common("VLLM_KV_CACHE_LAYOUT", "blocks are read as they lie in memory"),
    ),
    "sglang": (  # try_ensure_parallel_info in SGLang's disaggregation/common/conn.py, 0.5.16 and 0.5.23
        Common("model_path", "they compute the same model"),
        Common("page_size", "decode refuses a prefill server with other pages, which attention backends may set"),
        Common("kv_cache_dtype", "decode refuses a prefill server whose KV is of another type", "auto"),
        Common("dtype", "KV is of the model's type", "auto", DTYPES),
        Common("disaggregation_transfer_backend", "both ends of a transfer speak its protocol"),
        Common("disaggregation_decode_allocation_policy", "decode refuses a prefill server with another", "early"),
        Common("dsv4_attn_backend", "decode refuses a prefill server with another KV layout"),
        Common("SGLANG_DSV4_KV_LAYOUT", "decode refuses a prefill server with another KV layout"),
    ),
    "trtllm": (  # inquireSupport in TensorRT-LLM's batch_manager/cacheFormatter.cpp and mlaCacheFormatter.cpp
        Common("model", "they compute the same model"),
        Common("dtype", "KV is of the model's type", "auto"),
        Common("kv_cache_config.tokens_per_block", "its cache transceivers exchange whole blocks", 32),
        Common("kv_cache_config.dtype", "its cache transceivers convert nothing", "auto"),
        Common("speculative_config.decoding_type", "layers of a draft have KV too, and both must have as many"),
        Common("cache_transceiver_config.backend", "both ends of a transfer speak its protocol"),
        Common("cache_transceiver_config.transceiver_runtime", "both ends of a transfer speak its protocol", "auto"),
    ),
}


def check(backend: str, prefill: LaunchPlan, decode: LaunchPlan) -> tuple[Disagreement, ...]:
    """Everything in which the two differ and must not."""
    found = []
    for common in COMMON.get(backend, ()):
        ours, theirs = _value(common, decode), _value(common, prefill)
        if ours != theirs:
            message = f"{_shown(ours)} here, {_shown(theirs)} in prefill; write the same in both: {common.why}"
            found.append(Disagreement(common.name, message))
    return tuple(found)


def _value(common: Common, plan: LaunchPlan) -> Any:
    value: Any = plan.environment if common.name.isupper() else plan.arguments
    for part in common.name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    value = common.default if value is None else value
    value = (common.alike or {}).get(value, value)
    return _page_size(value, plan.arguments) if common.name == "page_size" else value


def _page_size(asked: Any, args: Mapping[str, Any]) -> Any:
    """What SGLang makes of it."""
    backends = [args.get("attention_backend"), args.get("decode_attention_backend")]
    for backend in (*backends, *PAGED_IN_PREFILL.intersection({args.get("prefill_attention_backend")})):
        taken = PAGES.get(str(backend), (asked,))
        asked = asked if asked in taken else taken[0]
    return asked


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)
