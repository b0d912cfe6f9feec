"""What the HTTP front needs of whatever generates; `dynamo_ray.request.dispatch.Dispatch` is the one in the product."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from backends.engine import TokenChunk
from dynamo_ray.request.generation import Generation
from dynamo_ray.routing.explanation import Explanation


class Service(Protocol):
    @property
    def max_model_len(self) -> int:
        """Prompt and answer together, in tokens; raises NotReady while nobody can say."""
        ...

    @property
    def max_logprobs(self) -> int:
        """How many alternatives a token there may be; raises NotReady while nobody can say."""
        ...

    def ready(self) -> str | None:
        """None when requests can be served, else why not, for a person."""
        ...

    def explain(self, request: Generation) -> Explanation:
        """Where it would go now, and why; nothing is sent or counted.

        Raises:
            RequestError: It would go nowhere.
        """
        ...

    def generate(self, request: Generation) -> AsyncGenerator[TokenChunk]:
        """Yield the tokens, the last with a finish reason; closing the generator aborts the request everywhere.

        What comes while nobody takes it may be merged into one chunk.

        Raises:
            RequestError: While iterating.
        """
        ...
