"""One try at a request on one pair of workers, and what the next try looks like when it fails. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from backends.engine import GenerateRequest, KVHandoff, Role, Sampling, TokenChunk
from dynamo_ray.errors import DeadlineExceeded, InternalError, InvalidRequest, RequestError, WorkerLost
from dynamo_ray.request.connection import LegFailed
from dynamo_ray.request.generation import Generation


@dataclass(slots=True)
class Attempt:
    """A request, the tokens its client already has, and how this try goes on from there.

    Greedy and unseeded requests continue: the tokens already delivered become prompt. Seeded sampling starts
    over and skips what was delivered, because an engine's generator cannot be moved to the middle of a sequence;
    both are token-exact where the engine is.
    """

    request: Generation
    deadline_s: float
    """On the loop's clock."""
    number: int = 0
    delivered: list[int] = field(default_factory=list)
    """Every token the client has, of this try and those before."""
    skip: int = 0
    """Tokens of this try that the client already has."""
    prefix: tuple[int, ...] = ()
    """Tokens that earlier tries delivered and this one continues from."""
    excluded: Mapping[str, LegFailed] = field(default_factory=dict)
    """Workers that failed this request, and how."""

    @property
    def token_ids(self) -> list[int]:
        """What this try's engines take as the prompt."""
        return [*self.request.token_ids, *self.prefix] if self.prefix else self.request.token_ids

    def leg(self, role: Role, dp_rank: int, handoff: KVHandoff | None) -> GenerateRequest:
        return GenerateRequest(
            request_id=f"{self.request.request_id}.{self.number}",
            token_ids=self.token_ids,
            sampling=_after(self.request.sampling, len(self.prefix)),
            leg=role,
            dp_rank=dp_rank,
            handoff=handoff,
            cache_salt=self.request.cache_salt,
        )

    def deliver(self, chunk: TokenChunk) -> TokenChunk | None:
        """What of this chunk the client has not had yet; None if nothing."""
        if self.skip:
            chunk = self._without_skipped(chunk)
        self.delivered += chunk.token_ids
        return chunk if chunk.token_ids or chunk.finish_reason is not None else None

    def after(self, failure: LegFailed, max_retries: int) -> Attempt:
        """The next try.

        Raises:
            InvalidRequest: The engine refused the request itself; no other would take it.
            WorkerLost: Tried often enough, or it cannot be replayed.
        """
        if not failure.retryable:
            raise _refusal(failure) from failure
        if self.number >= max_retries:
            raise WorkerLost(f"gave up after {self.number + 1} tries; the last one: {failure}") from failure
        retried = replace(self, number=self.number + 1, excluded={**self.excluded, failure.worker: failure})
        if not self.delivered:
            return retried
        sampling = self.request.sampling
        if sampling.temperature > 0 and sampling.seed is not None:
            return replace(retried, skip=len(self.delivered), prefix=())
        if sampling.presence_penalty or sampling.frequency_penalty:
            raise WorkerLost(
                f"lost after {len(self.delivered)} tokens, and a request with a presence or frequency penalty and no "
                f"seed cannot be replayed: {failure}"
            ) from failure
        return replace(retried, prefix=tuple(self.delivered))

    def deadline_error(self) -> RequestError:
        return DeadlineExceeded("the request took longer than its deadline allows", "timeout")

    def _without_skipped(self, chunk: TokenChunk) -> TokenChunk:
        dropped = min(self.skip, len(chunk.token_ids))
        self.skip -= dropped
        return msgspec.structs.replace(
            chunk,
            token_ids=chunk.token_ids[dropped:],
            logprobs=None if chunk.logprobs is None else chunk.logprobs[dropped:],
        )


def _after(sampling: Sampling, num_delivered: int) -> Sampling:
    if not num_delivered:
        return sampling
    return msgspec.structs.replace(
        sampling,
        max_tokens=sampling.max_tokens - num_delivered,
        min_tokens=max(0, sampling.min_tokens - num_delivered),
    )


def _refusal(failure: LegFailed) -> RequestError:
    if failure.field is not None:
        return InvalidRequest(failure.message, failure.field)
    return InternalError(str(failure))
