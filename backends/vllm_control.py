"""A researcher's commands to a running vLLM."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from backends.engine import Command, EngineError, Pause, Resume, Sleep, UpdateWeights, Wake
from backends.vllm_cpu_fixes import REPAIRED_VERSION

HANDOFF_WAIT_S = 60.0
"""For decode sides to fetch what they are owed; a lease is over before it."""
RETRY_S = 0.2
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def controls(llm: Any, on_cpu: bool, version: str) -> tuple[str, ...]:
    """The commands that this engine has, as it was started.

    Args:
        llm: vLLM's AsyncLLM.
        version: with another than the repaired one, new weights of experts are not computed with right on CPU.
    """
    from vllm.model_executor.model_loader import get_model_loader

    commands: list[type[Command]] = [Pause, Resume]
    config = llm.vllm_config
    misread = on_cpu and config.model_config.is_moe and version != REPAIRED_VERSION
    if not misread and hasattr(get_model_loader(config.load_config), "get_all_weights"):  # dummy, sharded ones have not
        commands.append(UpdateWeights)
    if not on_cpu and config.model_config.enable_sleep_mode:
        commands += [Sleep, Wake]
    return tuple(str(command.__struct_config__.tag) for command in commands)


class Control:
    """Carries commands out on one node's share, one at a time.

    Every node of a worker is told at once: with more than one attention DP rank vLLM pauses when all ranks have been
    asked to.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._paused = False
        self._asleep = False
        self._one = asyncio.Lock()

    async def carry_out(self, command: Command) -> None:
        """As `Engine.control`, for a command among `controls`."""
        async with self._one:
            try:
                await self._carry_out(command)
            except EngineError:
                raise
            except Exception as error:  # an engine core's failures come back as plain ones
                raise EngineError(f"vLLM failed to {_name(command)}: {error}") from error

    async def _carry_out(self, command: Command) -> None:
        match command:
            case Pause(abort):
                await self._llm.pause_generation(mode="abort" if abort else "keep", clear_cache=False)
                self._paused = True
            case Resume():
                self._paused = False
                if not self._asleep:
                    await self._llm.resume_generation()
            case UpdateWeights(path):
                await self._update_weights(path)
            case Sleep(discard_weights):
                await self._pause_with_empty_caches()
                await self._llm.sleep(level=2 if discard_weights else 1, mode="abort")
                self._asleep = True
            case Wake():
                await self._llm.wake_up()
                self._asleep = False
                if self._paused:
                    await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def _update_weights(self, path: str) -> None:
        """Requests inside are computed again from their beginning, with the new weights, and go on where they were.

        Where loading fails they stay paused: half of the weights may be new. The command may be given again.
        """
        if not await asyncio.to_thread(_has_weights, Path(path)):
            raise EngineError(f"{path} holds no weights on this node", retryable=False, field="path")
        if self._asleep:
            raise EngineError("the engine sleeps; wake it before it is given weights", retryable=False, field="command")
        await self._pause_with_empty_caches()
        core = self._llm.engine_core
        await core.call_utility_all_async("collective_rpc", "reload_weights", None, (), {"weights_path": path})
        if not self._paused:
            await self._llm.resume_generation()

    async def _pause_with_empty_caches(self) -> None:
        """A cache is emptied only as a whole. Running requests give their blocks back and are computed again later;
        what is handed over, or being fetched, cannot be taken away, so it is waited for."""
        deadline_s = time.monotonic() + HANDOFF_WAIT_S
        while True:
            if not self._paused:
                await self._llm.pause_generation(mode="keep", clear_cache=False)
            try:
                if await self._llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
                    return
                reason = "its KV connector's cache was not emptied"
            except Exception as error:  # noqa: BLE001 - an engine core's failures come back as plain exceptions
                reason = str(error)
            if not self._paused:
                await self._llm.resume_generation()
            if self._paused or time.monotonic() > deadline_s:
                raise EngineError(f"vLLM could not empty its caches: {reason}")
            await asyncio.sleep(RETRY_S)


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in WEIGHTS)


def _name(command: Command) -> str:
    return str(command.__struct_config__.tag).replace("_", " ")
