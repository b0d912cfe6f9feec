"""srt/managers/io_struct.py: requests as an engine's caller makes them. The manager checks the fields by version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class GenerateReqInput:
    """The real one's fields; those that were not given are None."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.given.get(name)


@dataclass(kw_only=True)
class PauseGenerationReqInput:
    mode: str = "abort"


@dataclass(kw_only=True)
class ContinueGenerationReqInput:
    torch_empty_cache: bool = True


@dataclass(kw_only=True)
class UpdateWeightFromDiskReqInput:
    model_path: str
    abort_all_requests: bool = False
    flush_cache: bool = True


@dataclass(kw_only=True)
class FlushCacheReqInput:
    timeout_s: float | None = None


@dataclass(kw_only=True)
class ReleaseMemoryOccupationReqInput:
    tags: list[str] | None = None


@dataclass(kw_only=True)
class ResumeMemoryOccupationReqInput:
    tags: list[str] | None = None
