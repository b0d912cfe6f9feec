"""The GPUs that layouts are planned on."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GpuType:
    """One GPU and its links; peak figures, dense FLOP/s.

    Source: aiconfigurator's system files. It takes 0.8 of the memory bandwidth as reachable.
    """

    name: str
    memory_gib: float
    memory_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    fp4_flops: float
    """0: computes no fp4."""
    nvlink_bytes_per_s: float
    """One way."""
    nvlink_domain_gpus: int
    gpus_per_node: int
    nic_bytes_per_s: float = 50e9
    """One way, one NIC of 400 Gb/s for each GPU."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)


GPU_TYPES = {
    gpu.name: gpu
    for gpu in (
        GpuType("H100", 80, 3.35e12, 989e12, 1978e12, 0, 450e9, 8, 8),
        # Sold as 141 GB; it has 141 GiB (mem_capacity 151397597184).
        GpuType("H200", 141, 4.8e12, 989e12, 1978e12, 0, 450e9, 8, 8),
        GpuType("B200", 180, 7.7e12, 2250e12, 4500e12, 9000e12, 900e9, 8, 8),
        GpuType("GB200", 185, 8e12, 2500e12, 5000e12, 10000e12, 900e9, 72, 4),
        GpuType("GB300", 277, 8e12, 2500e12, 5000e12, 15000e12, 900e9, 72, 4),
    )
}


def gpu_type(name: str) -> GpuType:
    """The GPU of that name. Raises ValueError for an unknown one; names those we know and the nearest."""
    if name in GPU_TYPES:
        return GPU_TYPES[name]
    near = get_close_matches(name.upper(), GPU_TYPES, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"unknown GPU {name!r}: known are {', '.join(GPU_TYPES)}{meant}")
