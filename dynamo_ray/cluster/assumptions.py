"""What a plan takes for granted about memory: what the command line says, else the engines' arguments, else a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamo_ray.config import DeploymentConfig, RoleConfig
from placement.model_shape import KvDtype

DEFAULT_MEM_FRACTION = 0.85
DEFAULT_KV_DTYPE = KvDtype.BF16

MEM_FRACTION = {
    "sglang": "mem_fraction_static",
    "vllm": "gpu_memory_utilization",
    "trtllm": "kv_cache_config.free_gpu_memory_fraction",
}
KV_DTYPE = {"sglang": "kv_cache_dtype", "vllm": "kv_cache_dtype", "trtllm": "kv_cache_config.dtype"}
SIZES = {
    "auto": KvDtype.BF16,
    "bf16": KvDtype.BF16,
    "bfloat16": KvDtype.BF16,
    "float16": KvDtype.BF16,
    "half": KvDtype.BF16,
    "fp8": KvDtype.FP8,
    "fp8_e4m3": KvDtype.FP8,
    "fp8_e5m2": KvDtype.FP8,
    "fp8_inc": KvDtype.FP8,
    "fp8_ds_mla": KvDtype.FP8_DS_MLA,
}
"""The engines' words for KV types that are as large as one of ours."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the caller says; None: as each role's engine_args say, else DEFAULT_MEM_FRACTION and DEFAULT_KV_DTYPE."""

    mem_fraction: float | None = None
    """Of each GPU's memory, for weights, buffers and KV."""
    kv_dtype: KvDtype | None = None
    prompt_tokens: int = 4096
    """Of a typical request; it weighs the traffic of prefill against that of decode."""
    answer_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """What one role's engines take of a GPU."""

    mem_fraction: float
    kv_dtype: KvDtype
    of_free: bool = False
    """The fraction is of what weights and buffers leave, and for KV alone."""

    def share(self, taken_bytes: int, total_bytes: int) -> float:
        """Of a GPU's whole memory, when weights and buffers take `taken_bytes` of it."""
        taken = min(1.0, taken_bytes / total_bytes)
        return taken + self.mem_fraction * (1 - taken) if self.of_free else self.mem_fraction


def role_memory(config: DeploymentConfig, role: RoleConfig, given: Assumptions) -> RoleMemory:
    """What holds for a role.

    Raises:
        ValueError: Its KV has a type whose size is not known here; begins with the argument.
    """
    kv_dtype = _kv_dtype(config, role, given)
    asked = _at(role.engine_args, MEM_FRACTION.get(config.backend))
    if given.mem_fraction is not None:
        return RoleMemory(given.mem_fraction, kv_dtype)
    if asked is None:
        return RoleMemory(DEFAULT_MEM_FRACTION, kv_dtype)
    return RoleMemory(float(asked), kv_dtype, of_free=config.backend == "trtllm")


def _kv_dtype(config: DeploymentConfig, role: RoleConfig, given: Assumptions) -> KvDtype:
    name = KV_DTYPE.get(config.backend)
    asked = _at(role.engine_args, name)
    if given.kv_dtype is not None:
        return given.kv_dtype
    if asked is None:
        return DEFAULT_KV_DTYPE
    if asked not in SIZES:
        raise ValueError(f"engine_args.{name}: no size is known for KV in {asked}; give --kv-dtype")
    return SIZES[asked]


def _at(args: Mapping[str, Any], name: str | None) -> Any:
    value: Any = args
    for part in name.split(".") if name else ():
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if name else None
