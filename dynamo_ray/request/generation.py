"""One answer to generate: what the HTTP front asks the pipeline for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backends.engine import Sampling
from dynamo_ray.routing.explanation import Route


@dataclass(frozen=True, slots=True)
class Generation:
    """A tokenised prompt and how to continue it; one choice of one client request."""

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    cache_salt: str | None = None
    lora: str | None = None
    """The adapter's name; None: the model itself."""
    priority: int = 0
    session: str | None = None
    """The conversation it belongs to, where the client names one."""
    told: Callable[[Route], None] | None = None
    """Called with where each try goes, before it begins."""
    deadline_s: float | None = None
    """On the loop's clock; None: the deployment's limit from its beginning on."""
