"""What commands make of a simulated engine: whether it steps, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from backends.engine import Command, EngineError, Pause, Resume, Sleep, UpdateWeights, Wake


@dataclass(frozen=True, slots=True)
class Condition:
    """As it is when an engine has started."""

    paused: bool = False
    asleep: bool = False
    weights: str | None = ""
    """The folder of the newest; empty: those it was started with; None: dropped."""

    @property
    def steps(self) -> bool:
        return not self.paused and not self.asleep

    @property
    def refusal(self) -> str | None:
        """Why nothing can be taken in now; what comes during a mere pause waits."""
        if self.asleep:
            return "the simulated engine is asleep"
        return "the simulated engine has no weights" if self.weights is None else None

    def after(self, command: Command, own_weights: str) -> Condition:
        """What a command makes of it; each may come twice.

        Args:
            own_weights: those it was started with.

        Raises:
            EngineError: The command cannot be carried out now; nothing has changed.
        """
        match command:
            case Pause():
                return replace(self, paused=True)
            case Resume():
                return replace(self, paused=False)
            case Sleep(discard_weights):
                return replace(self, asleep=True, weights=None if discard_weights else self.weights)
            case Wake():
                return replace(self, asleep=False)
            case UpdateWeights(path):
                if self.asleep:
                    raise EngineError("the simulated engine is asleep; wake it first", False, "command")
                if not Path(path).is_dir():
                    raise EngineError(f"there is no folder {path}", False, "path")
                return replace(self, weights="" if path == own_weights else path)
