"""An engine's start as something that its stop can end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from backends import model_folder
from backends.engine import EngineStartError, LaunchSpec

T = TypeVar("T")


class Startup:
    """Runs an engine's start in a task of its own."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None

    async def run(self, start: Coroutine[Any, Any, T]) -> T:
        """Return what `start` returns; cancelling this cancels it.

        Raises:
            EngineStartError: `end` was called meanwhile.
        """
        task: asyncio.Task[T] = asyncio.create_task(start)
        self._task = task
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            raise EngineStartError("it was stopped while it was starting") from None

    async def end(self) -> None:
        """Cancel the start if it still runs; when this returns, nothing of it does."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])


def check_model(spec: LaunchSpec) -> None:
    """Refuse a folder that holds no model: engines take it for the name of one on a hub, and ask there for minutes.

    Raises:
        EngineStartError: Names the field.
    """
    weights = spec.engine_args.get("load_format") != "dummy"
    lacks = model_folder.problem(Path(spec.model_path), weights)
    if lacks is not None:
        raise EngineStartError(f"model.path: {lacks} (on this node)")
    for name, folder in spec.loras.items():
        if not Path(folder, "adapter_config.json").is_file():
            raise EngineStartError(f"model.loras.{name}: {folder} holds no adapter_config.json on this node")
