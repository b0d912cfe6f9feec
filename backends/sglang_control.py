"""A researcher's commands to a running SGLang."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from backends.engine import Command, EngineError, Pause, Resume, Sleep, UpdateWeights, Wake

RETRY_S = 0.1
EMPTY_S = 10.0
"""How long a scheduler may take to let go of what was aborted, its last step included."""


class Control:
    """Carries commands out on a whole worker, one at a time.

    SGLang guards itself little: its schedulers end where one of a request inside is told to sleep or, in 0.5.16, given
    weights, and where memory is used or given back that it has not. So it is asked first whether it is empty.

    Args:
        manager: SGLang's TokenizerManager.
        keeps_weights: through a sleep, in the host's memory.
    """

    def __init__(self, manager: Any, keeps_weights: bool) -> None:
        self._manager = manager
        self._keeps_weights = keeps_weights
        self._paused = False
        self._asleep = False
        self._one = asyncio.Lock()

    async def carry_out(self, command: Command) -> None:
        """As `Engine.control`, for a command among the engine's."""
        if isinstance(command, UpdateWeights):
            if not await asyncio.to_thread(Path(command.path).is_dir):
                raise EngineError(f"{command.path} is no folder on this node", retryable=False, field="path")
            await self._answered()
        async with self._one:
            match command:
                case Pause(abort):
                    await self._pause(abort)
                    self._paused = True
                case Resume():
                    self._paused = False
                    if not self._asleep:
                        await self._go_on()
                case UpdateWeights(path):
                    await self._update_weights(path)
                case Sleep(discard_weights):
                    await self._sleep(discard_weights)
                case Wake():
                    await self._wake()

    async def _pause(self, abort: bool) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        if abort and self._manager.is_pause and not self._asleep:
            await self._go_on()  # schedulers that stand still end no request, which is then waited for without end
        await self._manager.pause_generation(PauseGenerationReqInput(mode="abort" if abort else "in_place"))

    async def _go_on(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._manager.continue_generation(ContinueGenerationReqInput())

    async def _answered(self) -> None:
        """Return when nothing is inside, or when it is paused, which may come meanwhile."""
        while not (self._paused or self._asleep):
            if await self._is_empty(RETRY_S):
                return

    async def _update_weights(self, path: str) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        if self._asleep:
            raise EngineError("the engine sleeps; wake it before it is given weights", retryable=False, field="command")
        if not await self._is_empty(EMPTY_S):
            raise EngineError(
                "SGLang takes no weights while requests are inside; resume it, or pause it with `abort`, before",
                retryable=False,
                field="command",
            )
        loaded, message, *_ = await self._manager.update_weights_from_disk(
            UpdateWeightFromDiskReqInput(model_path=path), None
        )
        if not loaded:
            raise EngineError(f"SGLang did not load {path}: {message}", retryable=False, field="path")

    async def _sleep(self, discard_weights: bool) -> None:
        """What is inside is aborted; what comes waits until it is awake."""
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        if not discard_weights and not self._keeps_weights:
            raise EngineError(
                "SGLang keeps weights through a sleep only with engine_args.enable_weights_cpu_backup; set it, or "
                "discard them",
                retryable=False,
                field="discard_weights",
            )
        if self._asleep:
            return
        await self._pause(abort=True)
        if not await self._is_empty(EMPTY_S):
            if not self._paused:
                await self._go_on()
            raise EngineError(f"SGLang did not let go of what is inside within {EMPTY_S:.0f} s")
        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(), None)
        self._asleep = True

    async def _wake(self) -> None:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        if not self._asleep:
            return
        await self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(), None)
        self._asleep = False
        if not self._paused:
            await self._go_on()

    async def _is_empty(self, limit_s: float) -> bool:
        """Whether every rank has nothing inside within that time; its cache is then empty too.

        Its own flush_cache() tells of the first rank that answers alone.
        """
        from sglang.srt.managers.io_struct import FlushCacheReqInput

        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        while True:
            answers = await self._manager.flush_cache_communicator(FlushCacheReqInput())
            if all(answer.success for answer in answers):
                return True
            if loop.time() > deadline:
                return False
            await asyncio.sleep(RETRY_S)
