"""HOW one engine runs: the Engine contract, and one adapter a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.engine import Engine, LaunchSpec, Role

BACKENDS = ("simulated", "vllm")


def create(backend: str, spec: LaunchSpec) -> Engine:
    """Make the engine of that backend; its `start` imports the library, and says so where that is not installed.

    Raises:
        ValueError: No such backend; names those there are.
    """
    if backend == "simulated":
        from backends.simulated import SimulatedEngine

        return SimulatedEngine(spec)
    if backend == "vllm":
        from backends.vllm import VLLMEngine

        return VLLMEngine(spec)
    raise ValueError(f"backend: unknown backend {backend!r}; there are {', '.join(BACKENDS)}")


def check_args(backend: str, role: Role, engine_args: Mapping[str, Any]) -> None:
    """Refuse what can be seen to be wrong before the engine's library is there; the engine checks the rest.

    Raises:
        EngineStartError: A key or value is wrong; the message starts with `engine_args.<key>: `.
    """
    if backend == "simulated":
        from backends.simulated_args import parse_args

        parse_args(engine_args)
    if backend == "vllm":
        from backends import vllm_args

        vllm_args.check_owned(engine_args)
