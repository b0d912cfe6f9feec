"""HOW one engine runs: the Engine contract, and one adapter a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.arguments import Mistake
    from backends.engine import Engine, LaunchSpec, Role

BACKENDS = ("simulated", "vllm", "sglang", "trtllm")
SOCKET_FOLDER = "<folder>"
"""Stands in a launch plan for a folder that is made at launch."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """What one node of one worker starts; before it has a place, with backends.placeholders in it."""

    environment: Mapping[str, str]
    arguments: Mapping[str, Any]
    """Under the engine's own names."""
    command: tuple[str, ...] = ()
    """Starts the engine's own server with the same arguments; empty for the simulated engine, which has none."""
    settings: str | None = None
    """What stands in the file that the command names, where it names one."""


def create(backend: str, spec: LaunchSpec) -> Engine:
    """Make the engine of that backend; its `start` imports the library, and says so where that is not installed.

    Raises:
        ValueError: No such backend; names those there are.
    """
    made: Engine
    if backend == "simulated":
        from backends.simulated import SimulatedEngine

        made = SimulatedEngine(spec)
    elif backend == "vllm":
        from backends.vllm import VLLMEngine

        made = VLLMEngine(spec)
    elif backend == "sglang":
        from backends.sglang import SGLangEngine

        made = SGLangEngine(spec)
    elif backend == "trtllm":
        from backends.trtllm import TensorRTLLMEngine

        made = TensorRTLLMEngine(spec)
    else:
        raise ValueError(f"backend: unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    return made


def resolve_version(backend: str, asked: str | None) -> str | None:
    """The version whose argument table holds for what a configuration asks for; None: this engine has but one.

    Raises:
        EngineStartError: It is not supported; names those that are.
    """
    from backends import arguments
    from backends.engine import EngineStartError

    if backend in arguments.SUPPORTED:
        return arguments.resolve(backend, asked)
    if asked is not None:
        raise EngineStartError(f"engine_version: the {backend} engine has no versions; leave it out")
    return None


def mistakes(backend: str, version: str | None, engine_args: Mapping[str, Any]) -> tuple[Mistake, ...]:
    """What can be seen to be wrong in a user's arguments before the engine's library is there.

    Args:
        version: what `resolve_version` returned.
    """
    from backends import arguments
    from backends.engine import EngineStartError

    if version is not None:
        return arguments.mistakes(backend, version, engine_args, import_module(f"backends.{backend}_args").OWNED)
    from backends.simulated_args import parse_args

    try:
        parse_args(engine_args)
    except EngineStartError as error:
        key, _, message = str(error).removeprefix("engine_args.").partition(": ")
        return (arguments.Mistake((key,), message),)
    return ()


def caches_prefixes(backend: str, role: Role, engine_args: Mapping[str, Any]) -> bool:
    """Whether an engine of that role, started with these, finds a prompt's blocks again for the next that begins alike.

    Raises:
        EngineStartError: The arguments cannot be.
    """
    from backends.engine import LaunchSpec

    spec = LaunchSpec(role, role, "", "", engine_args=engine_args)
    caches: bool = import_module(f"backends.{backend}_args").caches_prefixes(spec)
    return caches


def launch_plan(
    backend: str, version: str | None, spec: LaunchSpec, *, on_cpu: bool, env: Mapping[str, str] | None = None
) -> LaunchPlan:
    """What `create(backend, spec).start()` would start; pure.

    Args:
        version: what `resolve_version` returned.
        env: the user's own environment for the engine's processes.

    Raises:
        EngineStartError: The engine cannot start so; the message begins with the field at fault.
    """
    given = dict(env or {})
    extra: tuple[str, ...] = ()
    if version is None:
        return LaunchPlan(given, spec.engine_args)
    from backends import arguments, placeholders
    from backends.engine import EngineStartError

    if backend == "vllm":
        from backends import vllm_args

        port = spec.place.ports[0] if spec.place.ports else 0
        args = vllm_args.engine_args(spec, on_cpu)
        must, defaults = vllm_args.environment(spec, on_cpu, SOCKET_FOLDER, port, None)
        extra = () if vllm_args.share(spec).num_ranks else ("--headless",)
    else:
        adapter = import_module(f"backends.{backend}_args")
        args = adapter.engine_args(spec, version)
        must, defaults = adapter.environment(spec)
    for name, value in given.items():
        if must.get(name, value) != value:
            raise EngineStartError(f"env.{name}: every engine of {backend} is given its own; leave it out")
    args = placeholders.written(args)
    return LaunchPlan(
        {**defaults, **given, **must},
        args,
        (*arguments.command_line(backend, version, args), *extra),
        arguments.settings_file(args) if backend == "trtllm" else None,
    )
