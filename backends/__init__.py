"""HOW one engine runs: the Engine contract, and one adapter a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backends.engine import Engine, LaunchSpec

BACKENDS = ("simulated", "vllm")


def create(backend: str, spec: LaunchSpec) -> Engine:
    """Make the engine of that backend; its library is imported only now, and nothing starts yet.

    Raises:
        ValueError: No such backend; names those there are.
        EngineStartError: The backend's library is not installed; names the extra that brings it.
    """
    if backend == "simulated":
        from backends.simulated import SimulatedEngine

        return SimulatedEngine(spec)
    if backend == "vllm":
        from backends.vllm import VLLMEngine

        return VLLMEngine(spec)
    raise ValueError(f"backend: unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
