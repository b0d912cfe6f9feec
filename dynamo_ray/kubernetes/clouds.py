"""What differs between clouds in a pod that computes on GPUs: where it runs, its RDMA devices, what its libraries read.

Sources, read in November 2026: AWS, "Manage EFA devices on Amazon EKS"; Azure/aks-rdma-infiniband, "Network Operator"
(SR-IOV device plugin: one `rdma/ib` a NIC); Google, "Allocate network resources by using GKE managed DRANET"; NVIDIA
Dynamo's recipes for all three. None of it was run: there was no such cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamo_ray.errors import Problem
from dynamo_ray.kubernetes.options import Cloud
from placement.gpus import GPU_TYPES

CLIQUE_LABEL = "nvidia.com/gpu.clique"
"""Of a node, by NVIDIA's feature discovery: nodes of one value share an NVLink domain."""

_GIB_HOST = "/home/kubernetes/bin/gib"


@dataclass(frozen=True, slots=True)
class Machine:
    """The machines of one GPU type in a cloud."""

    selector: Mapping[str, str]
    devices_per_gpu: int = 1
    """RDMA devices to ask for."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """How pods reach the fast network of a cloud."""

    machines: Mapping[str, Machine]
    """By GPU type; others are refused."""
    resource: str | None
    """Asked for as an extended resource; None: by a ResourceClaim."""
    device_class: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    """Other resources that its driver needs."""
    host_paths: Mapping[str, str] = field(default_factory=dict)
    """Mount path -> path on the machine."""
    others: str = ""
    """Why another GPU type has no such network there, or what to use for it."""


def _products(**names: str) -> dict[str, Machine]:
    return {gpu: Machine({"nvidia.com/gpu.product": name}) for gpu, name in names.items()}


FABRICS: Mapping[Cloud, Fabric] = {
    "bare": Fabric(
        machines=_products(
            H100="NVIDIA-H100-80GB-HBM3",
            H200="NVIDIA-H200",
            B200="NVIDIA-B200",
            GB200="NVIDIA-GB200",
            GB300="NVIDIA-GB300",
        ),
        resource="rdma/ib",
    ),
    "eks-efa": Fabric(
        machines={
            "H100": Machine({"node.kubernetes.io/instance-type": "p5.48xlarge"}, devices_per_gpu=4),
            "H200": Machine({"node.kubernetes.io/instance-type": "p5en.48xlarge"}, devices_per_gpu=2),
            "B200": Machine({"node.kubernetes.io/instance-type": "p6-b200.48xlarge"}, devices_per_gpu=1),
        },
        resource="vpc.amazonaws.com/efa",
        env={
            "FI_PROVIDER": "efa",
            "FI_EFA_USE_DEVICE_RDMA": "1",
            # UCX has no EFA; SGLang reads it, other engines are told in their engine_args.
            "SGLANG_DISAGGREGATION_NIXL_BACKEND": "LIBFABRIC",
        },
        limits={"hugepages-2Mi": "5120Mi"},
        others="the number of its EFA devices is not known here; use bare, and add them",
    ),
    "aks-infiniband": Fabric(
        machines={
            "H100": Machine({"node.kubernetes.io/instance-type": "Standard_ND96isr_H100_v5"}),
            "H200": Machine({"node.kubernetes.io/instance-type": "Standard_ND96isr_H200_v5"}),
        },
        resource="rdma/ib",
        others="its machine type is not known here; use bare, and add its node selector",
    ),
    "gke-roce": Fabric(
        machines={
            "H200": Machine({"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}),
            "B200": Machine({"cloud.google.com/gke-accelerator": "nvidia-b200"}),
            "GB300": Machine({"cloud.google.com/gke-accelerator": "nvidia-gb300"}, devices_per_gpu=2),
        },
        resource=None,
        device_class="mrdma.google.com",
        env={"NCCL_NET": "gIB", "LD_LIBRARY_PATH": "/usr/local/gib/lib64:/usr/local/nvidia/lib64"},
        host_paths={"/usr/local/gib": _GIB_HOST, "/usr/local/nvidia": "/home/kubernetes/bin/nvidia"},
        others="GKE's managed DRANET gives its machines no RoCE devices (H100 there has GPUDirect-TCPXO); use bare",
    ),
}


def problem(cloud: Cloud, accelerator: str) -> Problem | None:
    """Why that GPU type cannot be had there; None where it can."""
    fabric = FABRICS[cloud]
    if accelerator not in GPU_TYPES or accelerator in fabric.machines:
        return None
    there = ", ".join(fabric.machines)
    return Problem("accelerator", f"{accelerator} on {cloud}, which is for {there}: {fabric.others}")


def claim_template(cloud: Cloud, accelerator: str, gpus: int, name: str) -> dict[str, Any] | None:
    """The ResourceClaimTemplate by which a pod of that many GPUs gets its RDMA devices; None where it needs none."""
    fabric = FABRICS[cloud]
    if fabric.device_class is None:
        return None
    exactly = {
        "deviceClassName": fabric.device_class,
        "allocationMode": "ExactCount",
        "count": fabric.machines[accelerator].devices_per_gpu * gpus,
    }
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": name},
        "spec": {"spec": {"devices": {"requests": [{"name": "rdma", "exactly": exactly}]}}},
    }


def device_limits(cloud: Cloud, accelerator: str, gpus: int) -> dict[str, str]:
    """The extended resources of a pod of that many GPUs, besides the GPUs."""
    fabric = FABRICS[cloud]
    devices = fabric.machines[accelerator].devices_per_gpu * gpus
    rdma = {fabric.resource: str(devices)} if fabric.resource is not None else {}
    return {**rdma, **fabric.limits}
